"""The frame and style that all HTML pages share, and text that is safe on a terminal."""
