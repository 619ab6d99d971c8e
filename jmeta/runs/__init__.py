"""What has a folder: settings, checkpoints, runs, their pictures and tables."""
