"""What a study may claim: trainings on fresh seeds, measured on the test split, and the statistics over them."""
