//! NIfTI-1 volumes, `.nii` and `.nii.gz`, read by the block.
//!
//! The header is read by the `nifti` crate, affine and spacing kept as they are. The voxels are read here, behind
//! `vox_offset` (so behind header extensions), once a file's claims have been checked against its length. Of a block only
//! the slab of each plane that holds it is read; a compressed file, in which nothing can be found before all that is in
//! front of it has been unpacked, is unpacked once, from a stream into a file of its own.

use super::volume::{Block, extents};
use super::{DataError, file, format};
use ::nifti::{Endianness, NiftiHeader, NiftiType, writer::WriterOptions};
use flate2::read::MultiGzDecoder;
use ndarray::{Array3, ShapeBuilder};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Largest volume that is unpacked: 16 GiB.
const LIMIT: u64 = 16 << 30;
const HEADER: usize = 348;
/// Bytes that are unpacked at a time.
const PIECE: usize = 1 << 20;

/// A volume `[x, y, z]` in a file. The file is held open and nothing of its voxels in memory.
#[derive(Debug)]
pub struct Volume {
    file: Mutex<File>,
    path: PathBuf,
    form: Box<Form>,
}

/// What a header says of the voxels.
#[derive(Debug)]
struct Form {
    header: NiftiHeader,
    shape: [usize; 3],
    kind: NiftiType,
    /// Bytes of an element.
    size: usize,
    /// Byte at which they begin, and at which they end.
    begin: u64,
    end: u64,
}

impl Form {
    /// Out of the first bytes of a file; `path` is for messages.
    fn read(
        from: &mut impl Read,
        path: &Path,
        failed: impl Fn(std::io::Error) -> DataError,
    ) -> Result<(Form, Vec<u8>), DataError> {
        let mut bytes = Vec::new();
        from.take(HEADER as u64).read_to_end(&mut bytes).map_err(failed)?;
        Ok((Form::parse(&bytes, path)?, bytes))
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Form, DataError> {
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
        // Below 352 the offset is a mistake that some writers make; the data follow the header then.
        let begin = if header.vox_offset >= 352.0 { header.vox_offset as u64 } else { 352 };
        let bytes = shape.iter().try_fold(size as u64, |n, d| n.checked_mul(*d as u64));
        let Some(end) = bytes.and_then(|n| n.checked_add(begin)) else {
            return Err(format(
                path,
                format!("its header says {shape:?} elements from byte {begin} on, beyond all bounds"),
            ));
        };
        Ok(Form { header, shape, kind, size, begin, end })
    }

    /// An element, slope and intercept applied.
    fn value(&self, b: &[u8]) -> f32 {
        let mut w = [0u8; 4];
        w[..b.len()].copy_from_slice(b);
        if self.header.endianness != Endianness::Little {
            w[..b.len()].reverse();
        }
        let raw = match self.kind {
            NiftiType::Uint8 => f32::from(b[0]),
            NiftiType::Int16 => f32::from(i16::from_le_bytes([w[0], w[1]])),
            NiftiType::Int32 => i32::from_le_bytes(w) as f32,
            _ => f32::from_le_bytes(w),
        };
        let NiftiHeader { scl_slope: slope, scl_inter: inter, .. } = self.header;
        let slope = if slope.is_finite() && slope != 0.0 { slope } else { 1.0 };
        raw * slope + if inter.is_finite() { inter } else { 0.0 }
    }
}

fn is_packed(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz"))
}

fn damaged(path: &Path) -> impl Fn(std::io::Error) -> DataError {
    move |e| format(path, format!("it cannot be unpacked ({e}); the file is damaged or cut short"))
}

/// A file's volume, unpacked into a file that is gone with its handle.
fn unpacked(packed: File, path: &Path) -> Result<File, DataError> {
    let mut stream = MultiGzDecoder::new(packed);
    let (form, head) = Form::read(&mut stream, path, damaged(path))?;
    if form.end > LIMIT {
        let why = format!(
            "its header says {:?} elements up to byte {}, and {LIMIT} bytes are the most",
            form.shape, form.end
        );
        return Err(format(path, why));
    }
    let place = std::env::temp_dir();
    let unwritten =
        |e| file("write", &place, format!("{e}; {} is unpacked there, or where TMPDIR says", path.display()));
    let mut to = tempfile::tempfile().map_err(unwritten)?;
    to.write_all(&head).map_err(unwritten)?;
    let (mut piece, mut at) = (vec![0; PIECE], HEADER as u64);
    loop {
        match stream.read(&mut piece).map_err(damaged(path))? {
            0 => return Ok(to),
            // What is behind the voxels is read for the sums that say whether all of it is whole.
            n if at < form.end => {
                let wanted = (form.end - at).min(n as u64) as usize;
                to.write_all(&piece[..wanted]).map_err(unwritten)?;
                at += n as u64;
            }
            n => at += n as u64,
        }
        if at > LIMIT {
            return Err(format(path, format!("it is of more than {LIMIT} bytes unpacked")));
        }
    }
}

impl Volume {
    /// Opens a file's volume.
    ///
    /// # Errors
    /// A file that is missing, cut short, corrupt, not 3-D, or of an element type other than uint8, int16, int32, float32;
    /// no place to unpack it.
    pub fn open(path: &Path) -> Result<Volume, DataError> {
        let f = File::open(path).map_err(|e| file("read", path, e))?;
        Volume::of(if is_packed(path) { unpacked(f, path)? } else { f }, path)
    }

    /// The volume of a file that is open and not compressed; `path` is for messages.
    ///
    /// # Errors
    /// As for [`Volume::open`].
    pub fn of(mut f: File, path: &Path) -> Result<Volume, DataError> {
        let unread = |e| file("read", path, e);
        f.seek(SeekFrom::Start(0)).map_err(unread)?;
        let (form, _) = Form::read(&mut f, path, unread)?;
        let length = f.metadata().map_err(unread)?.len();
        if form.end > length {
            let why = format!(
                "it is cut short: its header says {:?} elements of {} bytes from byte {} on, and it has {length} bytes",
                form.shape, form.size, form.begin
            );
            return Err(format(path, why));
        }
        Ok(Volume { file: Mutex::new(f), path: path.into(), form: Box::new(form) })
    }

    /// Extents.
    pub fn shape(&self) -> [usize; 3] {
        self.form.shape
    }

    /// Header: affine, spacing, units.
    pub fn header(&self) -> &NiftiHeader {
        &self.form.header
    }

    /// The values of a block `[x, y, z]`, slope and intercept applied.
    ///
    /// # Errors
    /// A file that can no longer be read.
    ///
    /// # Panics
    /// On a block that is not inside of the volume.
    pub fn read(&self, at: &Block) -> Result<Array3<f32>, DataError> {
        let Form { shape: [nx, ny, nz], size, begin, .. } = *self.form;
        let [x, y, z] = at;
        assert!(x.end <= nx && y.end <= ny && z.end <= nz, "a block outside of the volume");
        let [lx, ly, lz] = extents(at);
        let mut values = Vec::with_capacity(lx * ly * lz);
        if lx * ly * lz > 0 {
            // From the first to the last of its elements in a plane: x is the fastest in a file.
            let mut slab = vec![0; ((ly - 1) * nx + lx) * size];
            let mut f = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            for plane in z.clone() {
                let first = ((plane * ny + y.start) * nx + x.start) * size;
                let read = f.seek(SeekFrom::Start(begin + first as u64)).and_then(|_| f.read_exact(&mut slab));
                read.map_err(|e| file("read", &self.path, e))?;
                for row in slab.chunks(nx * size) {
                    values.extend(row[..lx * size].chunks_exact(size).map(|b| self.form.value(b)));
                }
            }
        }
        Array3::from_shape_vec((lx, ly, lz).f(), values).map_err(|e| format(&self.path, e.to_string()))
    }

    /// The labels of a block `[x, y, z]`: whole numbers from 0 on.
    ///
    /// # Errors
    /// Values that are no labels; as for [`Volume::read`].
    pub fn labels(&self, at: &Block) -> Result<Array3<i32>, DataError> {
        let values = self.read(at)?;
        let is_label = |v: f32| v.fract() == 0.0 && (0.0..=65535.0).contains(&v);
        if let Some(((x, y, z), v)) = values.indexed_iter().find(|(_, v)| !is_label(**v)) {
            let place = (at[0].start + x, at[1].start + y, at[2].start + z);
            let why = format!("the label at {place:?} is {v}, and labels are whole numbers from 0 to 65535");
            return Err(format(&self.path, why));
        }
        Ok(values.mapv(|v| v as i32))
    }
}

/// The extents of a file's volume; reads no more of the file than its header.
///
/// # Errors
/// As for [`Volume::open`], but for what only shows in the voxels.
pub fn shape_of(path: &Path) -> Result<[usize; 3], DataError> {
    let mut f = File::open(path).map_err(|e| file("read", path, e))?;
    let read = match is_packed(path) {
        true => Form::read(&mut MultiGzDecoder::new(f), path, damaged(path)),
        false => Form::read(&mut f, path, |e| file("read", path, e)),
    };
    Ok(read?.0.shape)
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
    let compress = is_packed(path);
    WriterOptions::new(path)
        .reference_header(&header)
        .compress(compress)
        .write_nifti(labels)
        .map_err(|e| file("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::super::volume::whole;
    use super::*;
    use ndarray::s;
    use proptest::prelude::*;

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
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(b).unwrap();
        Volume::of(f, Path::new("a.nii")).map_err(|e| e.to_string())
    }

    fn all(v: &Volume) -> Array3<f32> {
        v.read(&whole(v.shape())).unwrap()
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
                assert_eq!(all(&v)[[1, 2, 1]], f32::from(values[1 + 2 * 2 + 6]) * s + i);
                assert_eq!(v.header().pixdim[1], 3.0);
            }
        }
        let v = parsed(&bytes(&header(2, 8, DIM), 352.0, 1.0, 0.0, &[9; 12])).unwrap();
        assert!(all(&v).iter().all(|v| *v == 9.0));
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
        says(&bytes(&header(2, 8, DIM), 1e30, 1.0, 0.0, &[0; 12]), "beyond all bounds");
        says(&bytes(&header(2, 8, DIM), 1e18, 1.0, 0.0, &[0; 12]), "cut short");
    }

    #[test]
    fn labels_are_written_with_the_geometry_they_overlay() {
        let dir = tempfile::tempdir().unwrap();
        let like = parsed(&bytes(&header(4, 16, DIM), 352.0, 2.0, 1.0, &[0; 24])).unwrap().header().clone();
        let labels = Array3::from_shape_fn((2, 3, 2), |(x, y, z)| (x + 2 * y + 6 * z) as u8);
        for name in ["p.nii", "p.nii.gz"] {
            let path = dir.path().join(name);
            write_labels(&path, &labels, &like).unwrap();
            let written = Volume::open(&path).unwrap();
            assert_eq!(written.labels(&whole([2, 3, 2])).unwrap(), labels.mapv(i32::from));
            assert_eq!(shape_of(&path).unwrap(), [2, 3, 2]);
            let header = written.header().clone();
            assert_eq!((header.srow_x, header.pixdim[1..4].to_vec()), (like.srow_x, like.pixdim[1..4].to_vec()));
            assert!(same_place(&header, &like));
            assert!(!same_place(&header, &NiftiHeader { srow_x: [-3.0, 0.0, 0.0, 91.0], ..like.clone() }));
        }
        std::fs::write(dir.path().join("bad.nii.gz"), b"not gzip at all").unwrap();
        assert!(Volume::open(&dir.path().join("bad.nii.gz")).unwrap_err().to_string().contains("unpacked"));
    }

    fn packed(bytes: &[u8], path: &Path) {
        let mut f = flate2::write::GzEncoder::new(File::create(path).unwrap(), flate2::Compression::fast());
        f.write_all(bytes).unwrap();
        f.finish().unwrap();
    }

    #[test]
    fn a_compressed_file_that_is_damaged_or_claims_too_much_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.nii.gz");
        let refused = |bytes: &[u8], what: &str| {
            std::fs::write(&path, bytes).unwrap();
            let e = Volume::open(&path).unwrap_err().to_string();
            assert!(e.contains(what), "{e}");
        };
        packed(&bytes(&header(2, 8, DIM), 352.0, 1.0, 0.0, &[7; 12]), &path);
        assert!(all(&Volume::open(&path).unwrap()).iter().all(|v| *v == 7.0));
        let good = std::fs::read(&path).unwrap();
        refused(&good[..good.len() - 4], "damaged or cut short");
        // The sum over all of it is in the last eight bytes, behind all voxels.
        let mut bad = good.clone();
        *bad.iter_mut().rev().nth(6).unwrap() ^= 1;
        refused(&bad, "damaged or cut short");
        packed(&bytes(&header(2, 8, DIM), 352.0, 1.0, 0.0, &[7; 11]), &path);
        refused(&std::fs::read(&path).unwrap(), "is cut short");
        packed(&bytes(&header(2, 8, [3, 65535, 65535, 65535, 1, 1, 1, 1]), 352.0, 1.0, 0.0, &[0; 12]), &path);
        refused(&std::fs::read(&path).unwrap(), "bytes are the most");
    }

    proptest! {
        #[test]
        fn a_block_is_that_of_the_whole(
            shape in prop::array::uniform3(2usize..12),
            at in prop::array::uniform3((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
            kind in 0usize..4,
            pack in any::<bool>(),
            seed in any::<u8>(),
        ) {
            let (datatype, bits) = [(2, 8), (4, 16), (8, 32), (16, 32)][kind];
            let [x, y, z] = shape.map(|n| n as u16);
            let count = shape.iter().product::<usize>();
            // As floats they are of one exponent, so that none is NaN.
            let byte = |i: usize| if kind == 3 && i % 4 == 3 { 0x41 } else { (i * 37 + i / 251) as u8 ^ seed };
            let data: Vec<u8> = (0..count * bits as usize / 8).map(byte).collect();
            let file = bytes(&header(datatype, bits, [3, x, y, z, 1, 1, 1, 1]), 352.0, 2.0, -1.0, &data);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(if pack { "a.nii.gz" } else { "a.nii" });
            if pack { packed(&file, &path) } else { std::fs::write(&path, &file).unwrap() }
            let volume = Volume::open(&path).unwrap();
            let all = all(&volume);
            // Nothing of it is in memory, so what is read is what the file says.
            let last = &file[file.len() - bits as usize / 8..];
            prop_assert_eq!(all[shape.map(|n| n - 1)], volume.form.value(last));
            let at: Block = std::array::from_fn(|a| {
                let (i, j) = (at[a].0.index(shape[a] + 1), at[a].1.index(shape[a] + 1));
                i.min(j)..i.max(j)
            });
            let part = volume.read(&at).unwrap();
            let [x, y, z] = at.clone();
            prop_assert_eq!(&part, &all.slice(s![x, y, z]));
            if kind == 0 {
                // Labels are the values, and the first that is none is named by its place in the whole.
                match volume.labels(&at) {
                    Ok(labels) => prop_assert_eq!(labels.mapv(|l| l as f32), part),
                    Err(e) => {
                        let first = part.indexed_iter().find(|(_, v)| **v < 0.0).unwrap().0;
                        let place = (at[0].start + first.0, at[1].start + first.1, at[2].start + first.2);
                        prop_assert!(e.to_string().contains(&std::format!("the label at {place:?}")), "{}", e);
                    }
                }
            }
        }
    }
}
