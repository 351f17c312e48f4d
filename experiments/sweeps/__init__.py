"""Lists of runs, and the tables and pictures made of their results.

Programs: `run_list` runs a list of `lists/` and keeps a row for each run, `results_page` tabulates
all rows, `ablation_page` and `learning_rates_page` draw some of them, `gi_on_off` compares runs
with and without Gradient Inundation. They share:

- `grouped_rows`: rows, grouped where they may be compared.
- `paper_results`: the paper's Table 1.
"""
