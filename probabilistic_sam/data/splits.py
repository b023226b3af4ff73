"""The fixed split of patients into train, validation and test, by a hash of the patient's name."""

import hashlib

SPLITS = ("train", "validation", "test")


def patient_bucket(patient_id: str) -> int:
    """Bucket 0..99 of a patient such as `LIDC-IDRI-0001`: SHA-256 of the name, modulo 100."""
    return int(hashlib.sha256(patient_id.encode()).hexdigest(), 16) % 100


def split_of(patient_id: str) -> str:
    """Split of a patient: `train` for buckets 0-69, `validation` for 70-79, `test` for 80-99."""
    bucket = patient_bucket(patient_id)
    if bucket < 70:
        return "train"
    return "validation" if bucket < 80 else "test"
