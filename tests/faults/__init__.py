"""What may go wrong, done to real parts: kills, slow machines, deadlines, full disks, hostile files."""
