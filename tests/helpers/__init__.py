"""What test files share. Sentences are tested in two ways, so that a change of wording is a change in one place.

A single refusal, by the setting it names and the kind of the problem (``problems.py``)::

    with pytest.raises(ConfigError, match=problem("clip_range", "less than 1")):
    assert_problem(error, "clip_range", "less than 1")  # and it is the only one

A table of many, by whole sentences in ``tests/golden/<test file without test_>.txt`` (``golden.py``)::

    @pytest.mark.parametrize("case", CASES)
    def test_refused(case, golden):
        golden(case, problems(error))

``pytest FILE --update-golden`` rewrites that file from the tests that ran; review its diff as you would code.
"""
