"""What a check says: a table for people, JSON, JUnit XML, and GitHub's annotations and step summary."""
