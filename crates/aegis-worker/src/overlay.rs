//! The file of a disk that lies over another one: an empty qcow2 (version 3), as QEMU's documents
//! describe it. It names nothing that it lies over: QEMU is told that when it starts, so that no file
//! of a machine ever leads to another file of the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Unit of allocation, bytes.
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// What one entry of the first table leads to, bytes of the disk.
const L1_COVERS: u64 = CLUSTER * (CLUSTER / 8);
const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
const HEADER_LENGTH: u32 = 104;
/// Clusters: header, table of counts, counts, first table.
const COUNTS_TABLE: u64 = 1;
const COUNTS: u64 = 2;
const L1: u64 = 3;
/// Where the header tells the disk's size.
const SIZE_AT: u64 = 24;

/// Writes an empty one for a disk of this size, bytes, into an empty file.
pub fn write(file: &File, bytes: u64) -> io::Result<()> {
    let entries = bytes.div_ceil(L1_COVERS);
    let l1_clusters = (entries * 8).div_ceil(CLUSTER).max(1);
    let l1_size = u32::try_from(entries).map_err(io::Error::other)?;
    let mut header = Vec::with_capacity(HEADER_LENGTH as usize);
    header.extend(MAGIC.to_be_bytes());
    header.extend(3_u32.to_be_bytes());
    header.extend([0; 12]); // nothing that it lies over
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(bytes.to_be_bytes());
    header.extend([0; 4]); // no encryption
    header.extend(l1_size.to_be_bytes());
    header.extend((L1 * CLUSTER).to_be_bytes());
    header.extend((COUNTS_TABLE * CLUSTER).to_be_bytes());
    header.extend(1_u32.to_be_bytes());
    header.extend([0; 12]); // no snapshots
    header.extend([0; 24]); // no features
    header.extend(4_u32.to_be_bytes()); // counts of 16 bits
    header.extend(HEADER_LENGTH.to_be_bytes());
    let used = L1 + l1_clusters;
    let counts: Vec<u8> = (0..used).flat_map(|_| 1_u16.to_be_bytes()).collect();
    file.set_len(used * CLUSTER)?;
    file.write_all_at(&counts, COUNTS * CLUSTER)?;
    file.write_all_at(&(COUNTS * CLUSTER).to_be_bytes(), COUNTS_TABLE * CLUSTER)?;
    // The header last: without it the file is no disk.
    file.write_all_at(&header, 0)
}

/// The size of the disk in such a file, bytes; of a file that a machine's QEMU has written to.
pub fn size(file: &File) -> io::Result<u64> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)?;
    if u32::from_be_bytes(magic) != MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no qcow2"));
    }
    let mut size = [0; 8];
    file.read_exact_at(&mut size, SIZE_AT)?;
    Ok(u64::from_be_bytes(size))
}

/// The most that the file of such a disk can take, bytes: all of it was written, the tables, and holes
/// that discards left between. What it takes of the host's disk is bounded by what is written.
pub fn size_max(bytes: u64) -> u64 {
    bytes + bytes / 4 + 64 * CLUSTER
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_reads_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [512, 500_000_256, 20 << 30, 5 << 40] {
            let path = dir.path().join("disk");
            let file = File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            write(&file, bytes).unwrap();
            assert_eq!(size(&file).unwrap(), bytes);
            let Ok(check) = std::process::Command::new("qemu-img").arg("check").arg(&path).output()
            else {
                // Not part of what machines need; the suite's real machines run on such disks.
                continue;
            };
            let said = String::from_utf8_lossy(&check.stdout).into_owned();
            assert!(check.status.success() && said.contains("No errors"), "{said}");
        }
    }
}
