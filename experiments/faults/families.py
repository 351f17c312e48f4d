"""All faults, by family and name."""

from experiments.faults import damage, disks, kills, peers

FAMILIES = {
    "kills": kills.FAULTS,
    "disks": disks.FAULTS,
    "damage": damage.FAULTS,
    "peers": peers.FAULTS,
}
