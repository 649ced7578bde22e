"""The whole method in one run: teachers, features, both stages, evaluation, report, export."""
