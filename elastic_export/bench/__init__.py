"""What a benchmark needs beside the runtime: torch as a baseline, and the page that shows the results."""
