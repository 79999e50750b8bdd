"""Putting a run together: how it begins in its directory and resumes, its optimizer and averages, its micro-batch."""
