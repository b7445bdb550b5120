"""The HTML pages: one style sheet and one set of templates for all reports, and their words."""
