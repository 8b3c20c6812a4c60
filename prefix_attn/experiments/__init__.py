"""The experiments of the paper (Li and Liang 2021): plans, methods, one runner, tables and plots."""
