"""What people look at: status, report, comparison, figures."""
