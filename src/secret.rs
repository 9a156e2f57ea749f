//! A secret from a variable or a file: it never prints.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use thiserror::Error;

/// The largest file of a secret, in bytes.
const MAX_FILE_SIZE: u64 = 4096;

/// A text that can be sent in a header.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

/// What is wrong with a secret, as the end of a sentence. No text shows it.
#[derive(Debug, Error)]
pub enum BadSecret {
    /// Its file cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// Its file is no file of a secret.
    #[error("is larger than {}", binary(*.0))]
    TooLarge(u64),
    /// Windows' editors write this.
    #[error("is UTF-16: save it as UTF-8")]
    Utf16,
    /// It has no character.
    #[error("is empty")]
    Empty,
    /// Docker's `--env-file` keeps quotes.
    #[error("has a quote at its beginning or end, which is no part of it: remove it")]
    Quote,
    /// It cannot be sent.
    #[error("contains a line break, a blank or a non-ASCII character after {0} characters; copy it again")]
    Character(usize),
    /// It is a line of an env file, or of a header.
    #[error("begins with {0}, which is no part of it: remove that")]
    Prefix(String),
    /// It stands for a secret.
    #[error("holds a placeholder: replace it")]
    Placeholder,
    /// It can be guessed.
    #[error("has fewer than {0} characters")]
    Short(usize),
}

impl Secret {
    /// Checks a secret. White space around it is no part of it.
    ///
    /// # Errors
    /// It cannot be sent in a header.
    pub fn new(text: &str) -> Result<Self, BadSecret> {
        let text = text.trim();
        if text.is_empty() {
            return Err(BadSecret::Empty);
        }
        if text.starts_with(['"', '\'']) || text.ends_with(['"', '\'']) {
            return Err(BadSecret::Quote);
        }
        match text.bytes().position(|b| !b.is_ascii_graphic()) {
            Some(at) => Err(BadSecret::Character(at)),
            None => Ok(Secret(text.to_owned())),
        }
    }

    /// The secret, for a request.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// Reads the text of a file of at most 4 KiB, without a byte order mark.
///
/// # Errors
/// The file cannot be read, or it holds no text.
pub fn text(path: &Path) -> Result<String, BadSecret> {
    let bytes = bytes(path, MAX_FILE_SIZE)?;
    String::from_utf8(bytes).map_err(|error| BadSecret::Character(error.utf8_error().valid_up_to()))
}

/// Reads a file of at most this size, without a byte order mark.
///
/// # Errors
/// The file cannot be read, or it is UTF-16.
pub fn bytes(path: &Path, max_size: u64) -> Result<Vec<u8>, BadSecret> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max_size + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_size {
        return Err(BadSecret::TooLarge(max_size));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(BadSecret::Utf16);
    }
    Ok(bytes.strip_prefix(b"\xef\xbb\xbf").map(<[u8]>::to_vec).unwrap_or(bytes))
}

/// `4 KiB`, `16 MiB`.
fn binary(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
