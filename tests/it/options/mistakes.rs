//! Values that cannot be used.

use super::*;

/// Flag, variable, a value that it does not take, and words from what must be said of it beside the value.
type Mistake = (&'static str, &'static str, &'static str, &'static [&'static str]);

const BOOLEAN: &[&str] = &["true/false", "1/0", "yes/no", "on/off"];

#[rustfmt::skip] // a table
const MISTAKES: &[Mistake] = &[
    ("api-url", "BALENA_API_URL", "api.balena-cloud.com", &["https URL"]),
    ("api-url", "BALENA_API_URL", "ftp://api.balena-cloud.com", &["https URL"]),
    ("api-url", "BALENA_API_URL", "https://", &["https URL"]),
    ("api-url", "API_URL", "https://api.balena-cloud.com/v7/device", &["a path does not belong there; write https://api.balena-cloud.com;"]),
    ("ca-file", "CA_FILE", "missing.pem", &["cannot be read", "No such file", "PEM"]),
    ("ca-file", "BALENA_CA_FILE", "missing.pem", &["cannot be read", "No such file", "PEM"]),
    ("ca-file", "CA_FILE", "/dev/zero", &["larger than 16 MiB", "PEM"]),
    ("ca-file", "BALENA_CA_FILE", "folder", &["cannot be read", "directory", "PEM"]),
    ("ca-file", "BALENA_CA_FILE", "text.pem", &["PEM"]),
    ("ca-file", "BALENA_CA_FILE", "half.pem", &["PEM"]),
    ("ca-file", "BALENA_CA_FILE", "empty", &["no certificate"]),
    ("ca-file", "BALENA_CA_FILE", "key.pem", &["no certificate"]),
    ("ca-file", "BALENA_CA_FILE", "at@home.pem", &["PEM"]), // only a URL may hide what it got
    ("timeout", "API_TIMEOUT", "60", &["unit", "60s"]),
    ("timeout", "API_TIMEOUT", "10ms", &["1s", "1h"]),
    ("timeout", "API_TIMEOUT", "2h", &["1s", "1h"]),
    ("timeout", "API_TIMEOUT", "soon", &["1s", "1h"]),
    ("fleet", "FLEET", "acme/gateways/3", &["organization/name", "id", "name"]),
    ("fleet", "FLEET", "gateways,/acme", &["\"/acme\"", "organization/name"]),
    ("fleet", "APPLICATION", "acme/", &["organization/name"]),
    ("fleet", "FLEET", "99999999999999999999", &["id"]),
    ("tag", "DEVICE_TAG", "=prod", &["key=value"]),
    ("tag", "DEVICE_TAG", "my env=prod", &["\"my env\"", "white space"]),
    ("online-only", "ONLINE_ONLY", "maybe", BOOLEAN),
    ("address", "TARGET_ADDRESS", "wan", &["vpn, public or lan"]),
    ("", "USE_PUBLIC_URLS", "si", BOOLEAN),
    ("exporter", "EXPORTERS", "node", &["1 to 65535", "node:9100"]),
    ("exporter", "EXPORTERS", "80,node:0", &["\"node:0\"", "1 to 65535"]),
    ("exporter", "EXPORTERS", "65536", &["1 to 65535"]),
    ("exporter", "EXPORTERS", "+80", &["1 to 65535"]),
    ("exporter", "EXPORTERS", "my app:80", &["name", "a-z"]),
    ("exporter", "EXPORTERS", "80/metrics?x=y", &["has a query", "job its params", "__meta_balena_exporter"]),
    ("exporter", "EXPORTERS", "app:80?x=y", &["1 to 65535"]),
    ("exporter", "EXPORTERS", "80/metrics#x", &["not a plain path"]),
    ("exporter", "EXPORTERS", ",", &["no value"]),
    ("exporter", "EXPORTERS", "node:9100,Grafana:80", &["reserved", "another name"]),
    ("exporter", "EXPORTERS", "none,80", &["none means no exporter, but others are named"]),
    ("service-labels", "SERVICE_LABELS", "maybe", BOOLEAN),
    ("own-tags", "OWN_TAGS", "some", &["narrow", "all", "off"]),
    ("public-domain", "PUBLIC_URL_DOMAIN", "https://example.org", &["a domain name"]),
    ("public-domain", "PUBLIC_URL_DOMAIN", "example..org", &["a domain name"]),
    ("lan-network", "LAN_NETWORKS", "192.168.1.7/24", &["192.168.1.0/24", "comma-separated"]),
    ("labels", "LABELS", "uuid,hostname", &["no label", "device_name", "supervisor_version", "all", "none"]),
    ("sd-file", "SD_FILE_PATH", "folder", &["directory", "file"]),
    ("sd-file", "SD_FILE_PATH", "new/", &["directory", "file"]),
    ("sd-file-mode", "SD_FILE_MODE", "rw-r--r--", &["octal", "0400", "0777"]),
    ("sd-file-mode", "SD_FILE_MODE", "0688", &["octal"]),
    ("sd-file-mode", "SD_FILE_MODE", "0044", &["0400"]),
    ("sd-file-mode", "SD_FILE_MODE", "4755", &["0777"]),
    ("write-empty", "WRITE_EMPTY", "2", BOOLEAN),
    ("refresh", "REFRESH_RATE", "500", &["milliseconds", "unit", "30s"]),
    ("refresh", "REFRESH_RATE", "45", &["milliseconds", "unit", "45s"]),
    ("refresh", "REFRESH_RATE", "0", &["unit"]),
    ("refresh", "REFRESH_RATE", "500ms", &["1s"]),
    ("refresh", "REFRESH_RATE", "40d", &["30d"]),
    ("refresh", "REFRESH_RATE", "9999999999999999999999", &["30d"]),
    ("refresh", "REFRESH_RATE", "often", &["45s", "2m"]),
    ("oneshot", "ONESHOT", "once", BOOLEAN),
    ("dry-run", "DRY_RUN", "y", BOOLEAN),
    ("log-level", "LOG_LEVEL", "loud", &["off, error, warn, info, debug or trace"]),
    ("", "RUST_LOG", "baletheus=loud", &["baletheus=debug"]),
    ("log-format", "LOG_FORMAT", "xml", &["text", "json"]),
    ("listen", "LISTEN_ADDRESS", "9797", &["host:port", ":PORT"]),
    ("listen", "LISTEN_ADDRESS", ":http", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "127.0.0.1:99999", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "http://127.0.0.1:9797", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "a:b:9797", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "[::g%1]:9797", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "*:9797", &["host:port", ":PORT"]),
    ("listen", "LISTEN_ADDRESS", "a-label-of-more-than-63-characters-which-no-name-in-the-dns-may-have.test:80", &["cannot be resolved"]),
    ("status-host", "STATUS_HOSTS", "http://status.example.org", &["status.example.org", "comma-separated"]),
    ("status-token-file", "STATUS_TOKEN_FILE", "/nonexistent/token", &["16 characters"]),
    ("device-refresh", "DEVICE_REFRESH_RATE", "500", &["milliseconds", "unit"]),
    ("device-services", "DEVICE_SERVICES", "some", BOOLEAN),
    ("device-metrics", "DEVICE_METRICS", "some", BOOLEAN),
    ("tunnel-url", "TUNNEL_URL", "tunnel.balena-cloud.com", &["whole URL"]),
    ("tunnel-url", "TUNNEL_URL", "http://vpn:3128/v7", &["a path does not belong there; write http://vpn:3128;"]),
    ("listen", TUNNEL_LISTEN, "9798", &["host:port", ":PORT"]),
];

/// Of `baletheus tunnel` alone.
const TUNNEL_LISTEN: &str = "TUNNEL_LISTEN_ADDRESS";

/// The subcommand that takes this variable, if it is not the main one.
fn command_of(var: &str) -> &'static [&'static str] {
    if var == TUNNEL_LISTEN { &["tunnel"] } else { &[] }
}

/// What parsers say to programmers, and what does not read as a sentence.
const JARGON: &[&str] = &["target type", "digit found in string", "without a base", "number at 0", ": is "];

#[test]
fn a_mistake_is_named_as_it_was_given_with_what_it_got_and_what_it_takes() {
    let cloud = cloud();
    let mut wrong = Vec::new();
    for (flag, var, value, said) in MISTAKES {
        for (name, word) in
            [(format!("--{flag}"), format!("--{flag}={value}")), ((*var).into(), format!("{var}={value}"))]
        {
            if name == "--" {
                continue;
            }
            let errors = refused(&cloud, &[command_of(var), &[&*word]].concat());
            let is_said = |error: &String| {
                error.starts_with(&format!("{name} is {value:?}"))
                    && error.contains("it takes")
                    && said.iter().all(|said| error.contains(said))
                    && !JARGON.iter().any(|word| error.contains(word))
            };
            if errors.len() != 1 || !is_said(&errors[0]) {
                wrong.push(format!("{word}: {errors:#?} must say {said:?}, and none of {JARGON:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Each option that can be wrong is above.
    let tested: BTreeSet<_> = MISTAKES.iter().map(|row| row.1).chain(["API_KEY", "API_KEY_FILE"]).collect();
    assert_eq!(tested, TABLE.iter().flat_map(|row| row.1).copied().collect());
}

/// Docker makes a directory where a bind mount names a file that does not exist.
#[test]
fn a_directory_in_the_place_of_the_default_target_file_is_a_mistake() {
    let cloud = cloud();
    for words in [&[][..], &["--dry-run"], &["check"], &["tunnel"]] {
        let sidecar = sidecar(&cloud).args(words.iter().copied());
        std::fs::create_dir(sidecar.path("balena.json")).unwrap();
        let run = finish(sidecar.command());
        let says = "  the default of --sd-file (SD_FILE_PATH) is \"balena.json\": it is a directory; it takes: the path of a file\n";
        assert!(run.code == Some(2) && run.err.contains(says), "{words:?}: {}", run.err);
    }
}

/// Values without content. A shell script with an unset variable makes them, and `FLEET=" "` would select every device.
const NOTHING: &[&str] = &[" ", ",", "\r", " ,\t, ", "\u{a0}"];

#[test]
fn a_value_without_content_is_a_mistake_of_every_option() {
    let cloud = cloud();
    let mut wrong = Vec::new();
    for (flag, vars, _) in TABLE {
        let flags: &[String] = if flag.is_empty() { &[] } else { &[format!("--{flag}")] };
        let of_flag = flags.iter().flat_map(|name| NOTHING.iter().chain(&[""]).map(move |value| (name.clone(), value)));
        let of_vars = vars.iter().flat_map(|name| NOTHING.iter().map(move |value| ((*name).to_owned(), value)));
        for (name, value) in of_flag.chain(of_vars) {
            // Not one of the other names for the option takes its place.
            let good = if *flag == "fleet" && name != "FLEET" { "FLEET=acme/presses" } else { "LOG_LEVEL=info" };
            let good = if vars.contains(&"LOG_LEVEL") { "LOG_FORMAT=json" } else { good };
            let given = format!("{name}={value}");
            let words = [command_of(vars[0]), &[good, &given]].concat();
            let errors = refused_with(&cloud, &words, |command| {
                if *flag == "api-key-file" {
                    command.env_remove("API_KEY");
                }
            });
            let is_said = |error: &String| error.starts_with(&format!("{name} is {:?}: it has no value", value.trim()));
            let differs = format!("FLEET and {name} are set to different values");
            let is_differing = |error: &String| error.starts_with(&differs);
            if errors.len() != 1 || !errors.iter().all(|error| is_said(error) || is_differing(error)) {
                wrong.push(format!("{name}={value:?}: {errors:#?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // One empty flag among others, and a variable that another name for it does not mend.
    for words in [&["--fleet=acme/presses", "--fleet="][..], &["FLEET= ", "APPLICATION= "], &["--fleet", ""]] {
        assert_eq!(refused(&cloud, words).len(), 1, "{words:?}");
    }
}

#[test]
fn mistakes_of_more_than_one_option_name_all_of_them() {
    let cloud = cloud();
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &[&str])] = &[
        (&["USE_PUBLIC_URLS=true", "TARGET_ADDRESS=lan"], &["USE_PUBLIC_URLS", "TARGET_ADDRESS", "lan"]),
        (&["USE_PUBLIC_URLS=true", "TARGET_ADDRESS=vpn"], &["USE_PUBLIC_URLS", "TARGET_ADDRESS", "vpn"]),
        (&["USE_PUBLIC_URLS=true", "--address=lan"], &["USE_PUBLIC_URLS", "--address", "lan"]),
        (&["FLEET=a/b", "APPLICATION=c/d"], &["FLEET", "APPLICATION"]),
        (&["EXPORTERS=node:9100,app:80,node:9100"], &["EXPORTERS", "node:9100", "same target", "name"]),
        (&["--exporter=9100", "--exporter=none"], &["--exporter", "none means no exporter, but others are named as well"]),
        (&["--exporter=9100", "--exporter=9100/more"], &["--exporter", "9100/more", "same target", "name"]),
        // all public URLs of a device are one address
        (&["--address=public", "EXPORTERS=80,9100"], &["EXPORTERS", "80", "9100", "name"]),
        (&["USE_PUBLIC_URLS=1", "--exporter=80/a", "--exporter=80/b"], &["--exporter", "80/a", "80/b", "name"]),
        (&["--address=public", "EXPORTERS=node:80,node:9100"], &["EXPORTERS", "node:80", "node:9100", "name"]),
    ];
    let mut wrong = Vec::new();
    for (words, said) in rows {
        let errors = refused(&cloud, words);
        if errors.len() != 1 || !said.iter().all(|said| errors[0].contains(said)) {
            wrong.push(format!("{said:?} is not in {errors:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn more_fleets_than_a_url_can_hold_are_told_of() {
    let cloud = cloud();
    let fleets = |count| -> String { (1..=count).map(|id| format!("1000{id},")).collect() };
    let run = run(&sidecar(&cloud), &["--dry-run", "--fleet", &fleets(400)]);
    assert!(run.code == Some(1) && run.err.contains("431") && run.err.contains("name fewer"), "{}", run.err);
    assert_eq!(dry(&cloud, &["--fleet", &fleets(240)]).out, "[]\n");
}

/// systemd does not start it again after exit code 2.
#[test]
fn what_may_come_by_itself_is_no_mistake() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    let missing = run(&sidecar, &["API_KEY=", "API_KEY_FILE=run/missing"]);
    assert_eq!(missing.code, Some(1), "{}", missing.err);
    assert!(
        missing.err.contains("API_KEY_FILE is \"run/missing\": the file cannot be read: No such file"),
        "{}",
        missing.err
    );
    // In some containers, systemd makes no credential.
    let credential = run(&sidecar, &["API_KEY=", "API_KEY_FILE=run/missing", "CREDENTIALS_DIRECTORY=run"]);
    assert!(credential.code == Some(1) && credential.err.contains("LXC, LXD and Incus"), "{}", credential.err);
    // A zone may be a name. There may be no IPv6, but the address is one.
    let zone = if cfg!(target_os = "linux") { "lo" } else { "lo0" };
    let zoned = run(&sidecar, &[&format!("--listen=[fe80::1%{zone}]:1"), "API_URL=http://127.0.0.1:1"]);
    assert!(zoned.code == Some(1) && zoned.err.contains("cannot listen on [[fe80::1%"), "{}", zoned.err);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for words in [&[][..], &["tunnel"]] {
        let listen = [format!("LISTEN_ADDRESS={address}"), format!("TUNNEL_LISTEN_ADDRESS={address}")];
        let run = run(&sidecar, &[&[&*listen[0], &listen[1]], words].concat());
        assert!(run.code == Some(1) && run.err.contains("cannot listen on"), "{words:?} {}", run.err);
    }
}

#[test]
fn what_is_not_even_text_is_one_mistake() {
    let cloud = cloud();
    let mut wrong = Vec::new();
    for name in TABLE.iter().flat_map(|row| row.1) {
        let errors = refused_with(&cloud, command_of(name), |command| {
            if *name == "API_KEY_FILE" {
                command.env_remove("API_KEY");
            }
            command.env(name, OsStr::from_bytes(b"caf\xe9"));
        });
        if errors.len() != 1 || !errors[0].starts_with(&format!("{name} is not UTF-8")) {
            wrong.push(format!("{name}: {errors:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let words = [
        "API_KEY=",
        "BALENA_API_URL=balena-cloud.com",
        "--ca-file=missing.pem",
        "API_TIMEOUT=2h",
        "--fleet=a/b/c",
        "DEVICE_TAG=two words",
        "--online-only=maybe",
        "TARGET_ADDRESS=wan",
        "USE_PUBLIC_URLS=si",
        "--exporter=node",
        "PUBLIC_URL_DOMAIN=a..b",
        "--labels=hostname",
        "SD_FILE_PATH=folder",
        "--sd-file-mode=rw",
        "WRITE_EMPTY=2",
        "--refresh=500",
        "ONESHOT=once",
        "--dry-run=y",
        "LOG_LEVEL=loud",
        "RUST_LOG=a=b=c",
        "--log-format=xml",
    ];
    let errors = refused(&cloud(), &words);
    assert_eq!(errors.len(), words.len(), "{errors:#?}");
    for word in words {
        let (name, value) = word.split_once('=').unwrap();
        let told = if value.is_empty() { format!("{name} is not set") } else { format!("{name} is {value:?}") };
        let named: Vec<_> = errors.iter().filter(|error| error.starts_with(&told)).collect();
        assert_eq!(named.len(), 1, "{told} in {errors:#?}");
        assert!(value.is_empty() || named[0].contains("it takes"), "{named:?}");
    }
    // Of tags, each is for itself, and so is each of their mistakes.
    let errors = refused(&cloud(), &["--tag=a b", "--tag=fine", "--tag==c"]);
    assert!(errors.len() == 2 && errors[0].contains("\"a b\"") && errors[1].contains("\"=c\""), "{errors:#?}");
}

/// A switch needs no value, and a word behind it is none of its own; a key is never a flag. The library would name something else.
#[test]
fn what_looks_right_and_is_not_is_explained() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    for (words, said) in [
        (&["--fleet", "acme/gateways", "check"][..], "options go behind the command, such as: baletheus check --fleet"),
        (&["--online-only", "true"], "--online-only is a switch: write --online-only=true, or leave \"true\" out"),
        (&["--service-labels", "false"], "--service-labels is a switch: write --service-labels=false"),
        (&["check", "--dry-run", "0"], "--dry-run is a switch: write --dry-run=0"),
        (&["--api-key", KEY], "there is no --api-key, since the process list shows flags: set API_KEY"),
        (&["check", &format!("--token={KEY}")], "there is no --token,"),
    ] {
        let run = run(&sidecar, words);
        assert_eq!((run.code, &*run.out), (Some(2), ""), "{words:?}");
        assert!(run.err.contains(said) && run.err.contains("--help"), "{said:?} is not in {}", run.err);
    }
    for (word, said) in [
        ("9100:node", "write node:9100"),
        ("http://fridge:9100/metrics", "is a URL: write [NAME:]PORT[/PATH]"),
        ("9100;8080", "separate exporters with commas"),
        ("9100 8080", "separate exporters with commas"),
    ] {
        let errors = refused(&cloud, &["--exporter", word]);
        assert!(errors.len() == 1 && errors[0].contains(said), "{said:?} is not in {errors:#?}");
    }
    assert_eq!(cloud.requests().len(), 0);
}
