"""From result records to what is read: statistics, tables, claims and their verdicts, figures, documents."""
