"""LIDC-IDRI from five sources: DICOM series, three published sets of crops, and the phantom."""
