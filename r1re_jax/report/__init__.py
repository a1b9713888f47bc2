"""What people see of a run: metric writers, live progress, curves and the HTML report."""
