"""LIDC-IDRI from five sources: DICOM series, three published sets of crops, and the phantom."""

TITLE = "LIDC-IDRI slices with readers' masks"  # of the dataset cards
