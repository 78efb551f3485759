"""Draw an experiment as one HTML file: see experiment/report_page.py."""

from experiment.report_page import main

if __name__ == "__main__":
    main()
