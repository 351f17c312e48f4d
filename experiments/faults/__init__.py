"""Faults of machines, done to real runs: each is tried, and what was seen is recorded.

A family of faults is a module with `FAULTS`, name -> `fault(stage) -> record`:

- `kills`: processes that are killed or told to stop.
- `disks`: full, and read-only.
- `damage`: files that have changed between two lives of a run.
- `peers`: processes that do not find or do not fit each other, and a NaN in one of them.

`stage` makes the folder, the teacher and the runs, `processes` starts programs as their users do.

`python -m experiments.faults` runs them, `python -m experiments.faults.soak` kills one run many
times. All on this machine, on CPU, gloo between the processes.
"""
