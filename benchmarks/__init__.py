"""The benchmark suite: ``python -m benchmarks``.

Every suite uses the same method. All ways of doing the same thing run in one process. Each runs once per round, and
they take turns at being first, so drift of the machine affects all of them alike. Results are checked against float64
first, and a peer that is wrong is not timed. Preparation, compilation and tuning are reported but not timed. A peer
that cannot run gives a reason. A file of results holds the machine, versions, clocks, noise floor and every sample.
"""
