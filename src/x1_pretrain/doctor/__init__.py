"""Two minutes before money is burnt: is this machine fit for this run?

Measuring and judging are kept apart. `machine`, `gpu`, `disk`, `clock`, `services` and the processes
`*_trial` measure; `judge_machine` and `judge_run` turn plain numbers into findings and touch nothing. What
could hang or crash, torch above all, runs in a process of its own that is ended when its time is up.
"""
