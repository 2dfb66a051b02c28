"""What the tests share: oracles that share no code with the project, fake devices, workers, patience."""
