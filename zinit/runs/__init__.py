"""One run: settings, build, train, evaluate, and the folder that holds everything."""
