"""The coupled two-state recurrence over a grid."""
