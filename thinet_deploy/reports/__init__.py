"""What a run or several come to, for people: tables, ledgers, verdicts, pictures, pages."""
