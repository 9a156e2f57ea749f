//! The API key in use, which is read again from its file when it is refused: by the API with 401, by balena's VPN proxy with 407.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::secret::{Secret, key, text_again, without_key};

/// Replaced keys that the log hides. An answer that echoes an older one is unlikely.
const MAX_REPLACED: usize = 8;

/// The key in use, and the file that it came from. Clones share the key.
#[derive(Clone, Debug)]
pub struct KeySource {
    key: Arc<Mutex<Secret>>,
    /// The last ones that it has replaced.
    replaced: Arc<Mutex<VecDeque<Secret>>>,
    file: Option<PathBuf>,
}

impl KeySource {
    /// A key, and the file that it was read from, if any.
    pub fn new(key: Secret, file: Option<PathBuf>) -> Self {
        KeySource { key: Arc::new(Mutex::new(key)), replaced: Arc::default(), file }
    }

    /// A warning if others than its owner may write the file: they choose whose devices are listed.
    pub fn warning(&self) -> Option<String> {
        let file = self.file.as_ref()?;
        let mode = fs::metadata(file).ok()?.mode();
        let warning = || format!("others may write the key file {}: chmod go-w it", file.display());
        (mode & 0o022 != 0).then(warning)
    }

    pub fn current(&self) -> Secret {
        self.key.lock().clone()
    }

    /// A text without the key and those that it has replaced.
    pub fn hidden_in(&self, text: &str) -> String {
        let text = without_key(text, self.current().reveal());
        self.replaced.lock().iter().fold(text, |text, key| without_key(&text, key.reveal()))
    }

    /// Another key to try than the refused one: that of the file, which another thread may have read meanwhile. Blocks on the file
    /// system.
    ///
    /// # Errors
    /// There is no other key. If the file is why, the text says what is wrong with it, for a message about the key that is refused.
    pub fn renew(&self, refused: &Secret) -> Result<Secret, Option<String>> {
        let current = self.current();
        if current != *refused {
            return Ok(current);
        }
        let file = self.file.as_ref().ok_or(None)?;
        match text_again(file).and_then(|text| key(&text)) {
            Ok(key) if key == *refused => Err(None),
            Ok(key) => {
                *self.key.lock() = key.clone();
                let mut replaced = self.replaced.lock();
                if !replaced.contains(&current) {
                    replaced.truncate(MAX_REPLACED - 1);
                    replaced.push_front(current);
                }
                Ok(key)
            }
            Err(why) => Err(Some(format!("the key file {} {why}, so the old key stays", file.display()))),
        }
    }
}
