//! The API key while it changes, and where it must not be shown.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use crate::support::binary::{self, sidecar};
use crate::support::cloud::{Cloud, KEY, Reply};
use crate::support::fleet::{gateway, gateways};
use crate::support::sidecar::{Sidecar, finish};
use crate::support::status::Status;
use baletheus::config;
use base64::Engine as _;
use reqwest::header::HeaderValue;

use super::runner::no_secret;

/// Who may write the key file chooses whose devices are listed.
#[test]
fn a_key_file_that_others_may_write_is_warned_of() {
    let cloud = Cloud::start(gateways(1));
    let sidecar = sidecar(&cloud).env_remove("API_KEY").env("API_KEY_FILE", "key");
    let file = sidecar.path("key");
    fs::write(&file, KEY).unwrap();
    for (mode, warned) in [(0o600, false), (0o644, false), (0o620, true), (0o602, true), (0o666, true)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let log = sidecar.oneshot();
        let line = log.lines().find(|line| line.contains(" WARN  others may write the key file key: chmod go-w it"));
        assert_eq!(line.is_some(), warned, "{mode:o}: {log}");
    }
}

#[test]
fn a_rotated_key_needs_no_restart_and_a_lost_one_is_kept() {
    const ROTATED: &str = "rotated-named-key-77e0c45d1b9f2a38";
    let cloud = Cloud::start(gateways(5));
    let folder = tempfile::tempdir().unwrap(); // not in the sidecar's own, where the key must not be found
    let file = folder.path().join("key");
    fs::write(&file, format!("{KEY}\n")).unwrap();
    let sidecar = sidecar(&cloud).env_remove("API_KEY").env("API_KEY_FILE", file.to_str().unwrap());
    let sidecar = sidecar.env("RUST_LOG", "trace").env("LISTEN_ADDRESS", "127.0.0.1:0");
    let status = Status::start(&sidecar);
    let running = &status.running;
    running.wait_for("updated balena.json: 5 targets");
    let failures = || running.log().iter().filter(|line| line.contains("refresh failed: ")).count();
    let more = |count: u64| {
        cloud.change(|fleet| fleet.push(gateway(count)));
        running.signal("HUP");
        running.wait_for(&format!("updated balena.json: {count} targets on {count} devices (devices: +1 -0 ~0)"));
    };

    // The API has the new key first, and the file a moment later.
    cloud.set_key(ROTATED);
    let line = running.wait_for("refresh failed: ");
    assert!(
        line.contains("401 Unauthorized: the API key is wrong, expired or of another kind: check API_KEY"),
        "{line}"
    );
    fs::write(&file, ROTATED).unwrap();
    more(6);
    // The old key is hidden as the new one is.
    let echo = format!("{KEY} was replaced");
    cloud.intercept(move |_, _| Some(Reply::status(500, &[], echo.as_bytes())));
    let line = running.wait_for_lines("refresh failed: ", failures() + 1);
    assert!(line.contains("(the API key) was replaced"), "{line}");
    for path in ["/-/ready", "/"] {
        assert!(status.text(path).contains("(the API key) was replaced"), "{path}");
    }
    cloud.heal();
    running.wait_for("the refresh has succeeded again");
    // The other way round it costs not even a refresh.
    let before = failures();
    fs::write(&file, KEY).unwrap();
    cloud.set_key(KEY);
    more(7);
    assert_eq!(failures(), before);

    let garbage: [(&str, Option<&[u8]>); 7] = [
        ("gone", None),
        ("empty", Some(b"")),
        ("blank", Some(b" \n")),
        ("two words", Some(b"no key")),
        ("two lines", Some(b"no\nkey")),
        ("not ASCII", Some("schlüssel".as_bytes())),
        ("not UTF-8", Some(b"\xff\xfe\x00k")),
    ];
    for (count, (what, content)) in (8..).zip(garbage) {
        match content {
            Some(content) => fs::write(&file, content).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        // Servers echo the key in other forms than their own. Such an answer is not shown.
        let echo = format!("{{\"key\":\"{}\"}}", base64::engine::general_purpose::STANDARD.encode(KEY));
        cloud.intercept(move |_, _| Some(Reply::status(401, &[], echo.as_bytes())));
        let line = running.wait_for_lines("refresh failed: ", failures() + 1);
        assert!(!line.contains("\\\"key") && !line.contains("{"), "{what}: {line}");
        assert!(
            line.contains("401 Unauthorized: the API key is wrong, expired or of another kind: check API_KEY"),
            "{what}: {line}"
        );
        assert!(line.contains("; the key file ") && line.contains("so the old key stays"), "{what}: {line}");
        let kept = format!("Bearer {KEY}");
        assert!(
            cloud.requests().last().unwrap().header("authorization") == Some(&kept),
            "{what}: the key was forgotten"
        );
        cloud.heal();
        more(count);
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    cloud.intercept(|_, _| Some(Reply::status(401, &[], b"")));
    let line = running.wait_for_lines("refresh failed: ", failures() + 1);
    assert!(line.contains(" is no file, so the old key stays"), "{line}");
    cloud.heal();
    more(15);
    for key in [KEY, ROTATED] {
        no_secret("rotation", &sidecar, running, key);
    }
}

/// Whoever sees the log must not see the key, wherever it was typed by mistake.
#[test]
fn a_key_that_is_typed_as_an_option_is_not_logged() {
    let cloud = Cloud::start(gateways(1));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    fs::write(&file, KEY).unwrap();
    for sidecar in [sidecar(&cloud), sidecar(&cloud).env_remove("API_KEY").env("API_KEY_FILE", file.to_str().unwrap())]
    {
        for args in [&["--fleet=1", "--fleet", KEY][..], &["check", "--fleet=1", "--fleet", KEY], &["check", KEY]] {
            let mut command = sidecar.command();
            command.args(args).env("ONESHOT", "true").env("RUST_LOG", "trace");
            let output = finish(command);
            let log = String::from_utf8(output.stderr).unwrap();
            assert!(log.contains("(the API key)") && !log.contains(KEY), "{args:?}: {log}");
        }
    }
}

#[test]
fn a_key_is_in_no_debug_output_no_help_and_no_error() {
    for name in ["API_KEY", "BALENA_API_URL"] {
        let var = |asked: &str| match asked {
            "API_KEY" => Some(OsString::from(KEY)),
            _ if asked == name => Some("https://api.example.test".into()),
            _ => None,
        };
        let config = config::discovery(&config::command().get_matches_from(["baletheus"]), &var).unwrap();
        for shown in [format!("{config:?}"), format!("{config:#?}"), format!("{:?}", config.api.key)] {
            assert!(shown.contains("Secret(…)") && !shown.contains(&KEY[..8]), "{shown}");
        }
        assert_eq!(config.api.key.current().reveal(), KEY);
    }
    // What a panic would say, if a key could be one that no header takes.
    let error = HeaderValue::from_str(&format!("Bearer {KEY}\n")).unwrap_err();
    assert!(!format!("{error:?} {error}").contains(&KEY[..8]));

    let sidecar = Sidecar::new(binary::path());
    let run = |key: &str, args: &[&str]| {
        let mut command = sidecar.command();
        command.env("API_KEY", key).args(args).stdin(Stdio::null());
        let output = finish(command);
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    // The key may be typed in a wrong place.
    for args in [&[KEY][..], &["--api-url", KEY], &["--exporter", KEY], &["check", "--fleet", "a/b", KEY, KEY]] {
        let (code, said) = run(KEY, args);
        assert!(code == Some(2) && said.contains("(the API key)") && !said.contains(&KEY[..8]), "{args:?}: {said}");
    }
    // As well, where it comes from a file.
    let folder = tempfile::tempdir().unwrap(); // not in the sidecar's own, where the key must not be found
    let file = folder.path().join("key");
    fs::write(&file, format!("{KEY}\n")).unwrap();
    let file = file.to_str().unwrap();
    let flag = format!("--api-key-file={file}");
    for args in [&["--api-key-file", file, "--exporter", KEY][..], &[&flag, KEY], &["tunnel", &flag, "--listen", KEY]] {
        let (code, said) = run("", args);
        assert!(code == Some(2) && said.contains("(the API key)") && !said.contains(&KEY[..8]), "{args:?}: {said}");
    }
    let (code, help) = run(KEY, &["--help"]);
    assert!(code == Some(0) && help.contains("API_KEY") && !help.contains(&KEY[..8]), "{help}");
    for bad in
        ["simulated\nnamed", "simulated named", "simulatéd", "simulated\tnamed", "simulated\u{7f}", "simulated\r\nX: y"]
    {
        let (code, said) = run(bad, &["--oneshot"]);
        assert!(
            code == Some(2) && said.contains("API_KEY contains a line break, a blank or a non-ASCII character"),
            "{said}"
        );
        assert!(!said.contains("simulat"), "{said}");
    }
}
