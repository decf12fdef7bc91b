"""What any-model and feedback-on-convolutions say of their numbers."""

import dataclasses

import numpy as np
import pytest

from experiments import any_model, feedback_on_convolutions


def test_found_is_the_share_of_wrong_labels_among_as_many_examples():
    wrong = np.array([True, False, True, False, False])
    flips = any_model.Flips(np.zeros(5), wrong, np.arange(5.0), np.arange(5.0)[::-1], 0.5)
    assert flips.found(flips.norms) == 0  # examples 4 and 3
    assert flips.found(flips.losses) == 0.5  # examples 0 and 1


@pytest.mark.usefixtures("as_users_run")
def test_a_model_whose_library_is_missing_has_a_word(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(any_model, "installed", lambda name: False)
    names = ("Flax CNN", "Haiku LSTM")
    any_model.main(dataclasses.replace(any_model.TINY, models=names, out=tmp_path))
    printed = capsys.readouterr().out
    assert "needs flax" in printed
    assert "needs haiku" in printed
    assert (tmp_path / "any-model.png").exists()


def test_the_sentence_on_feedback_says_above_and_below():
    def outcome(method, accuracy):
        return feedback_on_convolutions.Outcome(
            method, 0.1, np.array([[accuracy]]), np.zeros((1, 1, 2)), 1.0
        )

    rules = {"backprop": 0.9, "sign-symmetric": 0.95, "feedback alignment": 0.5}
    outcomes = [outcome(*pair) for pair in rules.items()]
    said = feedback_on_convolutions.sentence(feedback_on_convolutions.Config(), outcomes)
    assert said == (
        "On digits a CNN comes to 90.0 % by backprop; sign-symmetric 5.0 points above, "
        "feedback alignment 40.0 points below"
    )
