"""One file a backend; each is the only one to import its library."""
