"""Write the tables of README.md: `python -m docs.generate`."""

from docs.generate.readme import README, with_tables

if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
