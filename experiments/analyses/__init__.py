"""Analyses of a run: what the paper claims of gradients, losses, codes and images, measured.

Programs, one module each: `gradient_angle`, `crossings`, `features`, `curvature`, `loss_surface`.
The pages of the first three are written by the modules `NAME_page`. All share:

- `runs`: loads a finished run, its student, synthetic and real images.
- `command_line`: the flags of programs that analyse a finished run.
- `figures`: the CSV files, pictures and paragraphs that they write.
- `geometry`: angles, Hessian traces and eigenvalues, directions in parameter space.
- `differentiable_student`: the quantized student, in a form that can be differentiated twice.
"""
