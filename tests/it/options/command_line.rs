//! Flags, help, completions, and variables with other names.

use super::*;

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    for (words, said) in [
        (&["--flet=acme/gateways"][..], &["--flet", "--fleet"][..]), // a near miss is guessed
        (&["acme/gateways"], &["acme/gateways"]),
        (&["--fleet"], &["--fleet", "value"]),
        (&["--refresh=1s", "--refresh=2s"], &["--refresh", "multiple times"]),
    ] {
        let run = run(&sidecar, words);
        assert_eq!((run.code, &*run.out), (Some(2), ""), "{words:?}");
        assert!(said.iter().all(|said| run.err.contains(said)), "{said:?} is not in {}", run.err);
        assert!(run.err.contains("--help"), "{}", run.err);
    }
    assert_eq!(cloud.requests().len(), 0);
}

#[test]
fn the_nearest_name_of_a_misspelt_variable_is_given() {
    let cloud = cloud();
    for (given, meant) in [
        ("EXPORTER", "EXPORTERS"),
        ("DRYRUN", "DRY_RUN"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("REFERSH_RATE", "REFRESH_RATE"),
        ("FLEETS", "FLEET"),
        ("SDFILE_PATH", "SD_FILE_PATH"),
        ("LISTEN_ADDR", "LISTEN_ADDRESS"),
        // The name of the flag: `TAG=x` would select every device.
        ("TAG", "DEVICE_TAG"),
        ("ADDRESS", "TARGET_ADDRESS"),
        ("TIMEOUT", "API_TIMEOUT"),
        ("REFRESH", "REFRESH_RATE"),
        ("LISTEN", "LISTEN_ADDRESS"),
        ("SD_FILE", "SD_FILE_PATH"),
        ("PUBLIC_DOMAIN", "PUBLIC_URL_DOMAIN"),
    ] {
        let run = dry(&cloud, &[&format!("{given}=x")]);
        let said = format!("the variable {given} is none of baletheus: is {meant} meant?");
        assert!(run.warnings().len() == 1 && run.err.contains(&said), "{said}: {}", run.err);
    }
    assert_eq!(
        dry(&cloud, &["APP_URL=x", "BALENA_API_KEY=x", "DEVICE_TYPE=x", "PORT=80", "_=/bin/x", "SD_=x"]).warnings(),
        [""; 0]
    );
    // It explains why an option counts as not set.
    let errors = refused(&self::cloud(), &["API_KEY=", "APIKEY=of-mine"]);
    assert!(
        errors.len() == 2 && errors[1].contains("is API_KEY meant?") && !errors[1].contains("of-mine"),
        "{errors:?}"
    );
}

/// Files of package managers and users' own folders have them.
#[test]
fn completions_have_flags_and_values() {
    for shell in ["bash", "zsh", "fish"] {
        let run = run(&Sidecar::new(binary::path()), &["completions", shell]);
        assert_eq!((run.code, &*run.err), (Some(0), ""), "{shell}");
        for word in ["lan-network", "narrow", "public", "completions"] {
            assert!(run.out.contains(word), "{word} is not in the completions of {shell}");
        }
    }
    assert_eq!(run(&Sidecar::new(binary::path()), &["completions", "cmd"]).code, Some(2));
    let full = fs::File::options().write(true).open("/dev/full").expect("the device that is full");
    let output = Command::new(binary::path()).args(["completions", "bash"]).stdout(full).output().expect("an end");
    let error = "baletheus: cannot write to standard output: No space left on device (os error 28)\n";
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(1), error));
}

#[test]
fn what_is_allowed_but_looks_wrong_is_warned_of() {
    let cloud = cloud();
    let through = format!("HTTP_PROXY={}", cloud.url()); // so that nothing leaves this machine
    let localhost = format!("http://localhost:{}", cloud.addr().port());
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &[&[&str]])] = &[
        (&[], &[]),
        (&["FLEET=acme/gateways,12"], &[]),
        (&["FLEET=gateways"], &[&["gateways", "several fleets", "acme/gateways, other/gateways"]]),
        (&["FLEET=acme/presses,nobody/here"], &[&["nobody/here", "was it renamed (an id survives that)"]]),
        (&["FLEET=77"], &[&["the API lists no device", "acme/gateways (id 11, 2 devices)"]]),
        (&["--address=public", "EXPORTERS=80"], &[]),
        (&["--address=public", "EXPORTERS=node:9100,app:80"], &[&["node:9100", "port 80", "9100 is not used"]]),
        (&["EXPORTERS=node:9100"], &[]),
        (&["--sd-file=list.json"], &[]),
        (&["--sd-file=targets.txt"], &[&["--sd-file", "targets.txt", ".json"]]),
        (&["--api-url", &localhost], &[]),
        // that API does not exist, hence the second one
        (&["--api-url=http://api.example.test", &through], &[&["key", "unencrypted", "http://api.example.test", "https"], &["refresh failed"]]),
        (&["--api-url=http://127.0.0.1.example.test", &through], &[&["key", "unencrypted", "https"], &["refresh failed"]]),
        (&["--api-url=https://127.0.0.1:1"], &[&["refresh failed"]]),
    ];
    for (words, expected) in rows {
        let run = run(&sidecar(&cloud), &[*words, &["--oneshot"]].concat());
        let warnings = run.warnings();
        assert_eq!(warnings.len(), expected.len(), "{words:?}\n{}", run.err);
        for (warning, said) in warnings.iter().zip(*expected) {
            assert!(said.iter().all(|said| warning.contains(said)), "{said:?} is not in {warning}");
        }
    }
    // Told once, not at each refresh.
    let (_dir, running) = start(&cloud, &["FLEET=gateways,nobody/here", "LOG_LEVEL=debug"]);
    running.wait_for_lines("is unchanged", 2);
    assert_eq!(stop(running, "TERM").warnings().len(), 2);
}

#[test]
fn help_is_whole_and_grouped_and_shows_no_values() {
    let listed: BTreeSet<_> = OPTIONS.iter().map(|opt| (opt.flag, opt.vars, opt.default)).collect();
    assert_eq!(listed, TABLE.iter().copied().collect());

    const MARK: &str = "marked-value";
    for (verb, args) in [
        (Verb::Discover, &["--help"][..]),
        (Verb::Discover, &["-h"]),
        (Verb::Check, &["check", "--help"]),
        (Verb::Tunnel, &["tunnel", "--help"]),
    ] {
        let mut command = Sidecar::new(binary::path()).args(args.iter().copied()).command();
        // Whatever they are set to: it is not shown, and not judged either.
        command.envs(OPTIONS.iter().flat_map(|opt| opt.vars).map(|var| (var, MARK))).current_dir("/");
        let help = finish(command);
        assert_eq!((help.code, &*help.err), (Some(0), ""));
        assert!(!help.out.contains(MARK), "{}", help.out);
        let mut wrong = Vec::new();
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let too_wide: Vec<_> = help.out.lines().filter(|line| line.chars().count() > 80).collect();
        assert_eq!(too_wide, [""; 0], "{args:?}");
        let is_short = args == ["-h"];
        for opt in OPTIONS.iter().filter(|opt| opt.verbs.contains(&verb)) {
            let start = if opt.flag.is_empty() { opt.vars[0].to_owned() } else { format!("--{}", opt.flag) };
            let is_its = |line: &str| {
                let rest = line.trim_start().strip_prefix(&start);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '[']))
            };
            let before: Vec<_> = help.out.lines().take_while(|line| !is_its(line)).collect();
            let heading = before.iter().rev().find(|line| !line.is_empty() && !line.starts_with(' ')).unwrap_or(&"");
            let group = if opt.flag.is_empty() { "Variables without a flag" } else { opt.group };
            let indent = |line: &str| line.len() - line.trim_start().len();
            let own: Vec<_> = help.out.lines().skip(before.len()).collect();
            if own.is_empty() && is_short {
                continue; // it is in the long help
            }
            // its line, and those below that are further in
            let first = own.first().map_or(0, |line| indent(line));
            let deeper = own.iter().skip(1).take_while(|line| indent(line) > first).count();
            let line = words(&own.get(..=deeper).unwrap_or_default().join(" "));
            let in_long_help = || {
                opt.vars.iter().all(|var| line.contains(var))
                    && line.contains(opt.more.trim_end_matches('.'))
                    && (opt.is_boolean() || line.contains(&format!("[takes: {}]", opt.takes)))
            };
            let whole = heading.strip_suffix(':') == Some(group)
                && (opt.default.is_empty()
                    || opt.is_boolean()
                    || line.contains(&format!("[default: {}]", opt.default.replace(',', ", "))))
                && line.contains(opt.short)
                && (is_short || opt.flag.is_empty() || in_long_help());
            if !whole {
                wrong.push(format!("{start} in {heading:?}: {line:?}"));
            }
        }
        assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), help.out);
        assert_eq!(help.out.contains("Example"), !is_short && args != ["help"], "{}", help.out);
    }
    assert!(OPTIONS.iter().map(|opt| opt.group).collect::<BTreeSet<_>>().len() > 3);
    for flag in ["--version", "-V"] {
        let version = run(&Sidecar::new(binary::path()), &[flag]);
        assert_eq!(version.code, Some(0));
        assert_eq!(version.out, format!("baletheus {}\n", env!("CARGO_PKG_VERSION")));
    }
}
