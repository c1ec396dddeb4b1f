//! NIfTI-1 volumes, `.nii` and `.nii.gz`.
//!
//! The header is read by the `nifti` crate, affine and spacing kept as they are. The voxels are read here, behind
//! `vox_offset` (so behind header extensions), so that a file's claims are checked against its length first.

use super::{DataError, file, format};
use ::nifti::{Endianness, NiftiHeader, NiftiType, writer::WriterOptions};
use ndarray::{Array3, ShapeBuilder};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A volume `[x, y, z]` and the header it came with.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Values, slope and intercept applied.
    pub voxels: Array3<f32>,
    /// Header: affine, spacing, units.
    pub header: NiftiHeader,
}

/// Largest file that is unpacked: 16 GiB.
const LIMIT: u64 = 16 << 30;
const HEADER: usize = 348;

/// Reads a volume.
///
/// # Errors
/// A file that is missing, cut short, corrupt, not 3-D, or of an element type other than uint8, int16, int32, float32.
pub fn read(path: &Path) -> Result<Volume, DataError> {
    parse(&unpacked(path, LIMIT)?, path)
}

/// The extents of a file's volume; reads no more of the file than its header.
///
/// # Errors
/// As for [`read`], but for what only shows in the voxels.
pub fn extents(path: &Path) -> Result<[usize; 3], DataError> {
    Ok(grid(&unpacked(path, HEADER as u64)?, path)?.shape)
}

/// The first `limit` bytes of a file, unpacked.
fn unpacked(path: &Path, limit: u64) -> Result<Vec<u8>, DataError> {
    let f = File::open(path).map_err(|e| file("read", path, e))?;
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz")) {
        let read = flate2::read::MultiGzDecoder::new(f).take(limit).read_to_end(&mut bytes);
        read.map_err(|e| format(path, format!("it cannot be unpacked ({e}); the file is damaged or cut short")))?;
    } else {
        f.take(limit).read_to_end(&mut bytes).map_err(|e| file("read", path, e))?;
    }
    Ok(bytes)
}

/// What a header says of the voxels.
struct Grid {
    header: NiftiHeader,
    shape: [usize; 3],
    kind: NiftiType,
    /// Bytes of an element.
    size: usize,
}

fn grid(bytes: &[u8], path: &Path) -> Result<Grid, DataError> {
    if bytes.len() < HEADER {
        return Err(format(path, format!("it has {} bytes, and a NIfTI header has {HEADER}", bytes.len())));
    }
    let header = NiftiHeader::from_reader(bytes)
        .map_err(|e| format(path, format!("it is no NIfTI-1 file ({e}); convert it to .nii or .nii.gz")))?;
    if &header.magic != b"n+1\0" {
        return Err(format(path, "it is half of a .hdr/.img pair; convert it to a single .nii file"));
    }
    let rank = header.dim[0] as usize;
    let extents: Vec<usize> = header.dim[1..].iter().take(rank).map(|d| usize::from(*d)).collect();
    let (space, rest) = extents.split_at(extents.len().min(3));
    let shape = match space {
        [x, y, z] if rank <= 7 && space.iter().all(|d| *d > 1) && rest.iter().all(|d| *d <= 1) => [*x, *y, *z],
        _ => return Err(format(path, format!("its extents are {extents:?}, and a single 3-D volume is needed"))),
    };
    let kind = header.data_type().map_err(|e| format(path, e.to_string()))?;
    let size = match kind {
        NiftiType::Uint8 => 1,
        NiftiType::Int16 => 2,
        NiftiType::Int32 | NiftiType::Float32 => 4,
        other => {
            let why = format!("its elements are {other:?}; convert them to uint8, int16, int32 or float32");
            return Err(format(path, why));
        }
    };
    Ok(Grid { header, shape, kind, size })
}

/// Reads a volume from the bytes of an unpacked file; `path` is for messages.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Volume, DataError> {
    let Grid { header, shape, kind, size } = grid(bytes, path)?;
    // Below 352 the offset is a mistake that some writers make; the data follow the header then.
    let offset = if header.vox_offset >= 352.0 { header.vox_offset as usize } else { 352 };
    let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let end = count.and_then(|n| n.checked_mul(size)).and_then(|n| n.checked_add(offset));
    let data = match end {
        Some(end) if end <= bytes.len() => &bytes[offset..end],
        _ => {
            let why = format!(
                "it is cut short: its header says {shape:?} elements of {size} bytes from byte {offset} on, and it has \
                 {} bytes",
                bytes.len()
            );
            return Err(format(path, why));
        }
    };
    let little = header.endianness == Endianness::Little;
    let word = |b: &[u8]| {
        let mut w = [0u8; 4];
        w[..b.len()].copy_from_slice(b);
        if !little {
            w[..b.len()].reverse();
        }
        w
    };
    let slope = if header.scl_slope.is_finite() && header.scl_slope != 0.0 { header.scl_slope } else { 1.0 };
    let inter = if header.scl_inter.is_finite() { header.scl_inter } else { 0.0 };
    let values = data.chunks_exact(size).map(|b| {
        let w = word(b);
        let raw = match kind {
            NiftiType::Uint8 => f32::from(b[0]),
            NiftiType::Int16 => f32::from(i16::from_le_bytes([w[0], w[1]])),
            NiftiType::Int32 => i32::from_le_bytes(w) as f32,
            _ => f32::from_le_bytes(w),
        };
        raw * slope + inter
    });
    let voxels = Array3::from_shape_vec((shape[0], shape[1], shape[2]).f(), values.collect())
        .map_err(|e| format(path, e.to_string()))?;
    Ok(Volume { voxels, header })
}

/// Reads labels: a volume of whole numbers from 0 on; with the header, to compare with the image's.
pub fn read_labels(path: &Path) -> Result<(Array3<i32>, NiftiHeader), DataError> {
    let Volume { voxels, header } = read(path)?;
    if let Some((at, v)) = voxels.indexed_iter().find(|(_, v)| v.fract() != 0.0 || !(0.0..=65535.0).contains(*v)) {
        let why = format!("the label at {at:?} is {v}, and labels are whole numbers from 0 to 65535");
        return Err(format(path, why));
    }
    Ok((voxels.mapv(|v| v as i32), header))
}

/// Whether two headers put their voxels in the same place, as far as both say: by spacing and by affine.
pub fn same_place(a: &NiftiHeader, b: &NiftiHeader) -> bool {
    let close = |v: &[f32], w: &[f32]| v.iter().zip(w).all(|(v, w)| (v - w).abs() <= 1e-3 * (1.0 + v.abs()));
    let affine = |h: &NiftiHeader| [h.srow_x, h.srow_y, h.srow_z].concat();
    let both = a.sform_code > 0 && b.sform_code > 0;
    close(&a.pixdim[1..4], &b.pixdim[1..4]) && (!both || close(&affine(a), &affine(b)))
}

/// Writes labels with the geometry of another volume, so that they overlay it.
pub fn write_labels(path: &Path, labels: &Array3<u8>, like: &NiftiHeader) -> Result<(), DataError> {
    let header = NiftiHeader { scl_slope: 1.0, scl_inter: 0.0, cal_min: 0.0, cal_max: 0.0, ..like.clone() };
    let compress = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz"));
    WriterOptions::new(path)
        .reference_header(&header)
        .compress(compress)
        .write_nifti(labels)
        .map_err(|e| file("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(datatype: i16, bitpix: i16, dim: [u16; 8]) -> NiftiHeader {
        NiftiHeader {
            datatype,
            bitpix,
            dim,
            pixdim: [1.0, 3.0, 2.0, 1.5, 0.0, 0.0, 0.0, 0.0],
            sform_code: 1,
            srow_x: [-3.0, 0.0, 0.0, 90.0],
            ..NiftiHeader::default()
        }
    }

    /// The bytes of a file with those fields.
    fn bytes(h: &NiftiHeader, offset: f32, slope: f32, inter: f32, data: &[u8]) -> Vec<u8> {
        let mut b = vec![0u8; offset.clamp(352.0, 1024.0) as usize];
        b[0..4].copy_from_slice(&348i32.to_le_bytes());
        for (i, d) in h.dim.iter().enumerate() {
            b[40 + 2 * i..42 + 2 * i].copy_from_slice(&d.to_le_bytes());
        }
        b[70..72].copy_from_slice(&h.datatype.to_le_bytes());
        b[72..74].copy_from_slice(&h.bitpix.to_le_bytes());
        for (i, p) in h.pixdim.iter().enumerate() {
            b[76 + 4 * i..80 + 4 * i].copy_from_slice(&p.to_le_bytes());
        }
        for (at, v) in [(108, offset), (112, slope), (116, inter), (280, h.srow_x[0]), (292, h.srow_x[3])] {
            b[at..at + 4].copy_from_slice(&v.to_le_bytes());
        }
        b[254..256].copy_from_slice(&h.sform_code.to_le_bytes());
        b[344..348].copy_from_slice(b"n+1\0");
        b.extend(data);
        b
    }

    const DIM: [u16; 8] = [3, 2, 3, 2, 1, 1, 1, 1];

    fn parsed(b: &[u8]) -> Result<Volume, String> {
        parse(b, Path::new("a.nii")).map_err(|e| e.to_string())
    }

    #[test]
    fn every_element_type_is_read_with_slope_and_intercept_behind_extensions() {
        let values: Vec<i16> = (0..12).map(|v| v * 7 - 30).collect();
        let i16s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let i32s: Vec<u8> = values.iter().flat_map(|v| i32::from(*v).to_le_bytes()).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| f32::from(*v).to_le_bytes()).collect();
        for (datatype, bits, data) in [(4, 16, &i16s), (8, 32, &i32s), (16, 32, &f32s)] {
            for (offset, slope, inter) in [(352.0, 2.0, -1.0), (416.0, f32::NAN, f32::NAN), (0.0, 0.0, 5.0)] {
                let v = parsed(&bytes(&header(datatype, bits, DIM), offset, slope, inter, data)).unwrap();
                let (s, i) = if slope == 2.0 { (2.0, -1.0) } else { (1.0, if inter.is_nan() { 0.0 } else { inter }) };
                // The first dimension varies fastest in the file.
                assert_eq!(v.voxels[[1, 2, 1]], f32::from(values[1 + 2 * 2 + 6]) * s + i);
                assert_eq!(v.header.pixdim[1], 3.0);
            }
        }
        let v = parsed(&bytes(&header(2, 8, DIM), 352.0, 1.0, 0.0, &[9; 12])).unwrap();
        assert!(v.voxels.iter().all(|v| *v == 9.0));
    }

    #[test]
    fn bad_files_are_refused_with_the_reason() {
        let good = bytes(&header(2, 8, DIM), 352.0, 1.0, 0.0, &[0; 12]);
        let says = |b: &[u8], what: &str| {
            let e = parsed(b).unwrap_err();
            assert!(e.contains(what), "{e}");
        };
        says(&good[..good.len() - 1], "cut short");
        says(&good[..100], "header has 348");
        says(&vec![7; 1000], "no NIfTI-1");
        says(&bytes(&header(2, 8, [2, 4, 3, 1, 1, 1, 1, 1]), 352.0, 1.0, 0.0, &[0; 12]), "3-D");
        says(&bytes(&header(2, 8, [4, 2, 3, 2, 5, 1, 1, 1]), 352.0, 1.0, 0.0, &[0; 60]), "3-D");
        says(&bytes(&header(128, 24, DIM), 352.0, 1.0, 0.0, &[0; 36]), "convert");
        says(&bytes(&header(2, 8, [3, 65535, 65535, 65535, 1, 1, 1, 1]), 352.0, 1.0, 0.0, &[0; 12]), "cut short");
        says(&bytes(&header(2, 8, DIM), 1e30, 1.0, 0.0, &[0; 12]), "cut short");
    }

    #[test]
    fn labels_are_written_with_the_geometry_they_overlay() {
        let dir = tempfile::tempdir().unwrap();
        let like = parsed(&bytes(&header(4, 16, DIM), 352.0, 2.0, 1.0, &[0; 24])).unwrap().header;
        let labels = Array3::from_shape_fn((2, 3, 2), |(x, y, z)| (x + 2 * y + 6 * z) as u8);
        for name in ["p.nii", "p.nii.gz"] {
            let path = dir.path().join(name);
            write_labels(&path, &labels, &like).unwrap();
            assert_eq!(read_labels(&path).unwrap().0, labels.mapv(i32::from));
            assert_eq!(extents(&path).unwrap(), [2, 3, 2]);
            let header = read(&path).unwrap().header;
            assert_eq!((header.srow_x, header.pixdim[1..4].to_vec()), (like.srow_x, like.pixdim[1..4].to_vec()));
            assert!(same_place(&header, &like));
            assert!(!same_place(&header, &NiftiHeader { srow_x: [-3.0, 0.0, 0.0, 91.0], ..like.clone() }));
        }
        std::fs::write(dir.path().join("bad.nii.gz"), b"not gzip at all").unwrap();
        assert!(read(&dir.path().join("bad.nii.gz")).unwrap_err().to_string().contains("unpacked"));
    }
}
