"""For tests of applications, and of keisei itself: faults, leak checks, scenarios with a limit.

- ``failpoints``: faults at exact places of a worker, and gates that hold one there.
- ``leaks``: a snapshot of what this process holds, and a check that nothing more is left.
- ``scenarios``: a limit that shows the stacks of everybody when it is exceeded.
- ``conformance``: what a backend promises, as checks that anybody's backend can run.
- ``pytest_plugin``: the leak check as a fixture; load it with ``pytest_plugins``.

Only the last one needs pytest. Nothing here waits for time to pass.
"""
