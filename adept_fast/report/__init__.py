"""Write the report: what a run gained, what it lost, and its settings and versions, as one HTML file and its charts."""
