//! The list as Prometheus' `file_sd_configs` and `http_sd_configs` take it: a target group for each target, a line each.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::entry::Entry;
use super::labels::{DEVICE_ID, DEVICE_NAME, MAX_VALUE_SIZE, META_DEVICE_NAME, UUID, member};

const START: &[u8] = b"[\n";

/// Writes the list.
pub fn write<'e>(entries: impl Iterator<Item = &'e Arc<Entry>>, out: &mut dyn Write) -> io::Result<()> {
    let mut text = Vec::new();
    let mut is_first = true;
    for entry in entries {
        text.clear();
        append(entry, &mut is_first, &mut text);
        out.write_all(&text)?;
    }
    out.write_all(end(is_first))
}

/// Whether a file holds this list and nothing else.
///
/// # Errors
/// The file cannot be read, ends too early, or differs.
pub fn are_in<'e>(entries: impl Iterator<Item = &'e Arc<Entry>>, file: impl Read) -> io::Result<bool> {
    let mut rest = Rest(file);
    write(entries, &mut rest)?;
    Ok(rest.0.read(&mut [0])? == 0)
}

/// The target groups of a device by themselves, with `,\n` between them; nothing if it has none.
pub fn of(entry: &Entry) -> Vec<u8> {
    let mut text = Vec::new();
    append(entry, &mut true, &mut text);
    text.drain(..text.len().min(START.len()));
    text
}

/// Appends the target groups of a device. `is_first` is whether the list has none before them.
pub fn append(entry: &Entry, is_first: &mut bool, out: &mut Vec<u8>) {
    let Some(uuid) = entry.uuid().filter(|_| !entry.targets().is_empty()) else { return };
    let host = entry.host();
    let own = own_labels(entry, uuid);
    let [before_id, after_id, fleet_tags] = &entry.common.labels;
    let id = entry.id().unwrap_or_default().to_string();
    for target in entry.targets() {
        out.extend_from_slice(if *is_first { START } else { b",\n" });
        *is_first = false;
        let port = target.exporter.port.to_string();
        let address = ["{\"targets\":[\"", &host, ":", &port, "\"],\"labels\":{"];
        let device: [&str; 8] = [&own, before_id, ",\"", DEVICE_ID, "\":\"", &id, "\"", after_id];
        let rest: [&str; 4] = [&entry.tag_labels, fleet_tags, &target.labels, "}}"];
        for part in address.iter().chain(&device).chain(&rest) {
            out.extend_from_slice(part.as_bytes());
        }
    }
}

pub fn end(is_first: bool) -> &'static [u8] {
    if is_first { b"[]\n" } else { b"\n]\n" }
}

/// The name and the uuid.
fn own_labels(entry: &Entry, uuid: &str) -> String {
    let mut labels = String::with_capacity(128);
    let name = entry.device_name();
    if !name.is_empty() && name.len() <= MAX_VALUE_SIZE {
        member(&mut labels, if entry.common.has_name_label { DEVICE_NAME } else { META_DEVICE_NAME }, name);
    }
    member(&mut labels, UUID, uuid);
    labels.remove(0); // the comma
    labels
}

/// What is left of a file that is compared with what is written here.
struct Rest<R>(R);

impl<R: Read> Write for Rest<R> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut same = vec![0; text.len()];
        self.0.read_exact(&mut same)?;
        if same == text { Ok(text.len()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
