"""The command line: parse, call one function, show. The only folder that imports typer and rich."""
