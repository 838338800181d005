"""From a placement to its trial record: in this process, or in worker processes that live as long as the study."""
