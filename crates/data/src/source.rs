//! Files as lines: plain, gzip or zstd, told apart by their first bytes, hashed while they are read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::DataError;

/// How a file is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not compressed.
    Plain,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
}

impl Compression {
    fn detect(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame, with which parallel compressors begin.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::Plain,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Compression::Plain => "plain text",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }
}

/// The lines of one file.
#[derive(Debug)]
pub(crate) struct LineReader {
    path: PathBuf,
    compression: Compression,
    content: Content,
    size: u64,
    line: usize,
}

/// What is left of a file that was read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// SHA-256 of the bytes on disk, in hexadecimal.
    pub sha256: String,
    /// Bytes on disk.
    pub bytes: u64,
}

type Raw = BufReader<Hashed<File>>;

enum Content {
    Plain(Raw),
    Gzip(Box<BufReader<Members<Raw>>>),
    Zstd(Box<BufReader<zstd::Decoder<'static, Raw>>>),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Content")
    }
}

const BUFFER: usize = 256 * 1024;

impl LineReader {
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let failed = |error| DataError::Open { path: path.to_path_buf(), error };
        if path.is_dir() {
            return Err(DataError::NotAFile { path: path.to_path_buf() });
        }
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let mut raw = BufReader::with_capacity(BUFFER, Hashed::new(file));
        let compression = Compression::detect(raw.fill_buf().map_err(failed)?);
        let content = match compression {
            Compression::Plain => Content::Plain(raw),
            Compression::Gzip => Content::Gzip(Box::new(BufReader::with_capacity(BUFFER, Members::new(raw)))),
            Compression::Zstd => {
                let decoder = zstd::Decoder::with_buffer(raw).map_err(failed)?;
                Content::Zstd(Box::new(BufReader::with_capacity(BUFFER, decoder)))
            }
        };
        Ok(LineReader { path: path.to_path_buf(), compression, content, size, line: 0 })
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    /// Bytes on disk, 0 for what has no size (a pipe).
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes taken from the disk so far.
    pub(crate) fn consumed(&self) -> u64 {
        match &self.content {
            Content::Plain(raw) => raw.get_ref().bytes,
            Content::Gzip(decoded) => decoded.get_ref().raw().get_ref().bytes,
            Content::Zstd(decoded) => decoded.get_ref().get_ref().get_ref().bytes,
        }
    }

    /// The next line that is not blank with its number from 1, without its line ending and a byte order mark.
    pub(crate) fn next_line(&mut self) -> Result<Option<(usize, Vec<u8>)>, DataError> {
        loop {
            let mut bytes = Vec::new();
            let read = match &mut self.content {
                Content::Plain(reader) => reader.read_until(b'\n', &mut bytes),
                Content::Gzip(reader) => reader.read_until(b'\n', &mut bytes),
                Content::Zstd(reader) => reader.read_until(b'\n', &mut bytes),
            };
            if read.map_err(|error| self.failed(error))? == 0 {
                return Ok(None);
            }
            self.line += 1;
            if self.line == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                bytes.drain(..3);
            }
            bytes.truncate(bytes.trim_ascii_end().len());
            if !bytes.trim_ascii_start().is_empty() {
                return Ok(Some((self.line, bytes)));
            }
        }
    }

    /// Reads what the decoder left over, so that the hash covers the whole file.
    pub(crate) fn finish(self) -> Result<Fingerprint, DataError> {
        let (path, kind, line) = (self.path, self.compression.name(), self.line);
        let mut raw = match self.content {
            Content::Plain(raw) => raw,
            Content::Gzip(decoded) => decoded.into_inner().into_raw(),
            Content::Zstd(decoded) => decoded.into_inner().finish(),
        };
        io::copy(&mut raw, &mut io::sink()).map_err(|error| DataError::Read { path, kind, line, error })?;
        Ok(raw.into_inner().finish())
    }

    fn failed(&self, error: io::Error) -> DataError {
        DataError::Read { path: self.path.clone(), kind: self.compression.name(), line: self.line, error }
    }
}

/// The members of a gzip file one after another. Zeros behind a member are skipped, as GNU gzip does: tapes and block
/// devices pad files with them.
struct Members<R> {
    /// Taken only to be replaced at once.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Members<R> {
    fn new(raw: R) -> Self {
        Members { member: Some(GzDecoder::new(raw)) }
    }

    fn member(&mut self) -> &mut GzDecoder<R> {
        self.member.as_mut().expect(ALWAYS_ONE)
    }

    fn raw(&self) -> &R {
        self.member.as_ref().expect(ALWAYS_ONE).get_ref()
    }

    fn into_raw(self) -> R {
        self.member.expect(ALWAYS_ONE).into_inner()
    }

    /// Goes on to the next member, if there is one.
    fn advance(&mut self) -> io::Result<bool> {
        loop {
            let raw = self.member().get_mut();
            let bytes = raw.fill_buf()?;
            let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
            match bytes.len() {
                0 => return Ok(false),
                all if zeros == all => raw.consume(zeros),
                _ => {
                    raw.consume(zeros);
                    self.member = self.member.take().map(|ended| GzDecoder::new(ended.into_inner()));
                    return Ok(true);
                }
            }
        }
    }
}

const ALWAYS_ONE: &str = "a member that is taken is replaced at once";

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.member().read(buffer)?;
            if read > 0 || buffer.is_empty() || !self.advance()? {
                return Ok(read);
            }
        }
    }
}

/// Hashes and counts what passes through.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R> Hashed<R> {
    fn new(inner: R) -> Self {
        Hashed { inner, hash: Sha256::new(), bytes: 0 }
    }

    fn finish(self) -> Fingerprint {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Fingerprint { sha256, bytes: self.bytes }
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn lines(bytes: &[u8]) -> Result<Vec<(usize, String)>, DataError> {
        let file = written(bytes);
        let mut reader = LineReader::open(file.path())?;
        let mut lines = Vec::new();
        while let Some((number, line)) = reader.next_line()? {
            lines.push((number, String::from_utf8(line).unwrap()));
        }
        let fingerprint = reader.finish()?;
        assert_eq!(fingerprint.bytes, bytes.len() as u64);
        let expected: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(fingerprint.sha256, expected);
        Ok(lines)
    }

    fn numbered(lines: &[(usize, &str)]) -> Vec<(usize, String)> {
        lines.iter().map(|&(number, line)| (number, line.to_owned())).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    const TEXT: &[u8] = b"\xef\xbb\xbf{\"a\":1}\r\n\n   \t\r\n{\"b\":2}\n{\"c\":3}";

    fn expected() -> Vec<(usize, String)> {
        numbered(&[(1, "{\"a\":1}"), (4, "{\"b\":2}"), (5, "{\"c\":3}")])
    }

    #[test]
    fn a_plain_file_loses_bom_line_endings_and_blank_lines_but_keeps_its_line_numbers() {
        assert_eq!(lines(TEXT).unwrap(), expected());
    }

    #[test]
    fn compressed_files_are_recognised_by_their_content() {
        assert_eq!(lines(&gzip(TEXT)).unwrap(), expected());
        assert_eq!(lines(&zstd::encode_all(TEXT, 3).unwrap()).unwrap(), expected());
    }

    #[test]
    fn concatenated_members_and_frames_are_read_to_the_end() {
        let members = [gzip(b"x\n"), gzip(b"y\n")].concat();
        assert_eq!(lines(&members).unwrap(), numbered(&[(1, "x"), (2, "y")]));
        let frames = [zstd::encode_all(&b"x\n"[..], 3).unwrap(), zstd::encode_all(&b"y\n"[..], 3).unwrap()].concat();
        assert_eq!(lines(&frames).unwrap(), numbered(&[(1, "x"), (2, "y")]));
    }

    #[test]
    fn zeros_behind_a_gzip_member_are_skipped_and_hashed() {
        let padding = vec![0; BUFFER + 5];
        assert_eq!(lines(&[gzip(TEXT), padding.clone()].concat()).unwrap(), expected());
        let between = [gzip(b"x"), padding, gzip(b"y\n"), vec![0]].concat();
        assert_eq!(lines(&between).unwrap(), numbered(&[(1, "xy")]));
        let error = lines(&[gzip(b"x\n"), b"\0garbage".to_vec()].concat()).unwrap_err().to_string();
        assert!(error.contains("gzip"), "{error}");
    }

    #[test]
    fn a_truncated_compressed_file_is_an_error_that_names_the_kind() {
        let many: Vec<u8> =
            (0..2000u32).flat_map(|n| format!("{}\n", n.wrapping_mul(2654435761)).into_bytes()).collect();
        for (bytes, kind) in [(gzip(&many), "gzip"), (zstd::encode_all(&many[..], 3).unwrap(), "zstd")] {
            let error = lines(&bytes[..bytes.len() / 2]).unwrap_err().to_string();
            assert!(error.contains(kind), "{error}");
        }
    }

    #[test]
    fn a_missing_file_and_a_directory_are_errors_that_name_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing.jsonl");
        let error = LineReader::open(&missing).unwrap_err().to_string();
        assert!(error.contains("missing.jsonl") && error.contains("cannot be opened"), "{error}");
        assert!(matches!(LineReader::open(directory.path()), Err(DataError::NotAFile { .. })));
    }
}
