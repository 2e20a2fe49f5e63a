"""The vocabulary: records, protocols, configuration, distribution, errors. Imports nothing else of ours."""
