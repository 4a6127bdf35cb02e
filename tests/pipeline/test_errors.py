"""One sentence for the user, wherever the error was raised."""

from __future__ import annotations

import pickle

from pipeline.errors import UserError, nearest, user_error_within


def test_nearest_names_only_what_is_alike():
    assert nearest("max_step", ["max_steps", "seed"]) == " (did you mean 'max_steps'?)"
    assert nearest("zzz", ["max_steps", "seed"]) == ""


def test_user_error_survives_pickling():
    assert pickle.loads(pickle.dumps(UserError("why"))).message == "why"


def test_user_error_is_found_inside_wrappers():
    inner = UserError("the reason")
    wrapped = RuntimeError("outer")
    wrapped.worker_failures = {0: RuntimeError("x"), 1: inner}
    outermost = ValueError("outermost")
    outermost.__cause__ = wrapped
    assert user_error_within(outermost) is inner
    assert user_error_within(ValueError("other")) is None
