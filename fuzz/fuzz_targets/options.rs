//! Any text as the value of an option, an exporter, a fleet or a tag: it is taken or refused, and no message shows the key.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use baletheus::balena::{FleetRef, TagFilter};
use baletheus::config::{self, OPTIONS};
use baletheus::discovery::exporter;

/// These read files or look up names, so a fuzzer must not choose their values.
const OUTSIDE: [&str; 5] = ["API_KEY_FILE", "CA_FILE", "BALENA_CA_FILE", "LISTEN_ADDRESS", "TUNNEL_LISTEN_ADDRESS"];
const KEY: &str = "a-key-that-nobody-may-see";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Lines of values, each for the variable that its first byte selects.
    let names: Vec<_> = OPTIONS.iter().flat_map(|opt| opt.vars).filter(|name| !OUTSIDE.contains(name)).collect();
    let set: Vec<_> = bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split_first())
        .map(|(first, value)| (*names[usize::from(*first) % names.len()], value))
        .collect();
    let var = |name: &str| {
        let value = set.iter().find(|(set, _)| *set == name).map(|(_, value)| OsString::from_vec(value.to_vec()));
        if name == "API_KEY" { Some(KEY.into()) } else { value }
    };
    let matches = config::command().try_get_matches_from(["baletheus"]).expect("no arguments");
    let shown = format!("{:?}", config::discovery(&matches, &var));
    assert!(!shown.contains(KEY), "{shown}");

    for (_, value) in set {
        let Ok(text) = str::from_utf8(value) else { continue };
        if let Ok(list) = exporter::parse_list(text) {
            let again: Vec<_> = list.iter().map(ToString::to_string).collect();
            assert_eq!(exporter::parse_list(&again.join(",")), Ok(list));
        }
        if let Ok(fleet) = FleetRef::parse(text) {
            assert_eq!(FleetRef::parse(&fleet.to_string()), Ok(fleet));
        }
        if let Ok(TagFilter { key, value }) = TagFilter::parse(text) {
            let key = key.replace('\\', r"\\").replace('=', r"\=");
            let again = value.as_ref().map_or(key.clone(), |value| format!("{key}={value}"));
            assert_eq!(TagFilter::parse(&again).expect("what was read").value, value);
        }
    }
});
