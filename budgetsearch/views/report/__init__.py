"""What people read: progress, tables, the report and the model card."""
