//! `cargo run --example demo`, as the README has it: what it shows, and that nothing is left of it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::sidecar::{PATIENCE, Running, finish};
use crate::support::tools;
use serde_json::{Value, json};

/// The demo in a process group of its own, as a shell starts it.
struct Demo {
    /// Taken at its end.
    running: Option<Running>,
    group: u32,
}

impl Demo {
    /// The demo ends by itself after a while: if the test is cut short, a signal to the test does not reach the demo's group.
    fn start(seconds: u32) -> Self {
        Self::start_by(seconds, |cargo| cargo)
    }

    /// By a command that is made from the one of Cargo.
    fn start_by(seconds: u32, wrap: impl FnOnce(Command) -> Command) -> Self {
        // What is not built yet may take its time.
        let build = tools::cargo("build").args(["--bin", "baletheus", "--example", "demo"]).status();
        assert!(build.expect("cargo runs").success());
        let mut command = tools::cargo("run");
        command.args(["--example", "demo", "--", "--seconds", &seconds.to_string()]);
        let mut command = wrap(command);
        command.process_group(0);
        let running = Running::spawn(command);
        Self { group: running.id(), running: Some(running) }
    }

    fn wait_for(&self, text: &str) -> String {
        self.running.as_ref().expect("it runs").wait_for(text)
    }

    /// The target file that it tells of.
    fn list(&self) -> PathBuf {
        let line = self.wait_for("the target file is");
        PathBuf::from(line.rsplit(' ').next().expect("a path"))
    }

    /// Expects that it ends well, and that no process and no file of it is left.
    fn expect_end(mut self, list: &Path) {
        let deadline = Instant::now() + PATIENCE;
        while self.processes().len() > 1 {
            assert!(Instant::now() < deadline, "still there: {:?}", self.processes());
            thread::sleep(Duration::from_millis(20));
        }
        let (status, log) = self.running.take().expect("it runs").wait();
        assert!(status.success(), "{status}\n{}", log.join("\n"));
        assert_eq!(self.processes(), [""; 0]);
        assert!(!list.parent().expect("a folder").exists());
    }

    /// All of its group, with their commands.
    fn processes(&self) -> Vec<String> {
        let output = Command::new("ps").args(["-A", "-o", "pgid=,pid=,args="]).output().expect("ps is there");
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let group = self.group.to_string();
        lines.lines().filter(|line| line.split_whitespace().next() == Some(&group)).map(str::to_owned).collect()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if self.running.is_some() {
            let _ = Command::new("kill").args(["-s", "KILL", "--", &format!("-{}", self.group)]).status();
        }
    }
}

fn kill(signal: &str, whom: &str) {
    let sent = Command::new("kill").args(["-s", signal, "--", whom]).status().expect("kill is there");
    assert!(sent.success(), "kill -s {signal} {whom}");
}

fn client() -> reqwest::blocking::Client {
    // reqwest asks for a TLS provider, even for http.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::blocking::Client::builder().no_proxy().build().expect("a client")
}

fn get(url: &str) -> Value {
    let text = client().get(url).send().and_then(reqwest::blocking::Response::text).expect("an answer");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("GET {url}: {error}: {text}"))
}

#[test]
fn shows_a_fleet_until_ctrl_c() {
    let demo = Demo::start(300);
    demo.wait_for("updated balena.json: 25 targets on 24 devices (devices: +24 -0 ~0), 1 device left out");
    let list = demo.list();
    let groups: Value = serde_json::from_slice(&fs::read(&list).expect("the target file")).expect("JSON");
    assert_eq!(groups.as_array().map(Vec::len), Some(25));
    assert_eq!(groups[0]["labels"]["device_name"], "fridge-01");

    // The addresses come below the log of the first list.
    demo.wait_for("demo: Ctrl-C ends all of it");
    let log = demo.running.as_ref().expect("it runs").log();
    let place = |text: &str| log.iter().position(|line| line.contains(text)).unwrap_or_else(|| panic!("no {text}"));
    let first = place("demo: open http://");
    assert!(log[first..].iter().take_while(|line| !line.contains("Ctrl-C")).all(|line| line.starts_with("demo: ")));
    assert!(first > place("such lines at log level debug") && first > place("counts as absent"), "{}", log.join("\n"));
    for line in log.iter().filter(|line| line.starts_with("demo: open ")) {
        let url = line.split(' ').nth(2).expect("a URL");
        let answer = client().get(url).send().expect("an answer");
        let kind = answer.headers()["content-type"].to_str().expect("text").to_owned();
        assert!(answer.status().is_success() && kind.starts_with("text/html"), "{url}: {} {kind}", answer.status());
    }
    expect_targets(&prometheus(&log));
    let check = log.iter().find_map(|line| line.split_once("does not answer: ")).expect("a line").1;
    let output = finish({
        let mut shell = Command::new("sh");
        shell.args(["-c", check]).current_dir("/").env("HTTP_PROXY", "http://127.0.0.1:1");
        shell
    });
    let (table, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let counts = " answer, 1 fail, 3 offline; 1 device left out";
    assert!(output.status.code() == Some(1) && table.contains(counts), "{table}{errors}");
    let first = table.lines().nth(1).expect("a row");
    assert!(first.starts_with("freezer-01 ") && first.contains("port 80 closed"), "{table}");
    demo.wait_for("now runs release");
    demo.wait_for("updated balena.json: 26 targets on 24 devices (devices: +0 -0 ~1)");
    kill("INT", &format!("-{}", demo.group));
    demo.expect_end(&list);
}

/// The URL of Prometheus, which tells whether it has pages.
fn prometheus(log: &[String]) -> String {
    let line = log.iter().find(|line| line.starts_with("demo: ") && line.contains(" Prometheus ")).expect("Prometheus");
    let (_, url) = line.split_once("http://").expect("a URL");
    format!("http://{}", url.split('/').next().expect("an address"))
}

/// All targets are up but three devices that are offline and one without its exporter, and nothing beside this machine is asked.
fn expect_targets(prometheus: &str) {
    let deadline = Instant::now() + PATIENCE;
    let targets = loop {
        let targets = get(&format!("{prometheus}/api/v1/targets?state=active"))["data"]["activeTargets"].clone();
        let targets = targets.as_array().expect("targets").clone();
        if targets.len() == 27 && targets.iter().all(|target| target["health"] != "unknown") {
            break targets;
        }
        assert!(Instant::now() < deadline, "{targets:#?}");
        thread::sleep(Duration::from_millis(100));
    };
    let name = |target: &Value| target["labels"]["device_name"].as_str().unwrap_or_default().to_owned();
    let mut down: Vec<_> = targets.iter().filter(|target| target["health"] != "up").map(name).collect();
    down.sort();
    assert_eq!(down, ["freezer-01", "fridge-03", "gw-narvik", "lamp-0006"], "{targets:#?}");
    for target in &targets {
        let url = target["scrapeUrl"].as_str().expect("a URL");
        let host = url.trim_start_matches("http://").split(':').next().expect("a host");
        assert!(host == "127.0.0.1" || host.ends_with(".balena"), "{url}");
    }
    let alertmanagers = get(&format!("{prometheus}/api/v1/alertmanagers"))["data"].clone();
    assert_eq!(
        (&alertmanagers["activeAlertmanagers"], &alertmanagers["droppedAlertmanagers"]),
        (&json!([]), &json!([]))
    );
}

#[test]
fn resolves_no_name_and_connects_to_this_machine_only() {
    let found = Command::new("strace").arg("--version").output();
    assert!(found.is_ok_and(|output| output.status.success()), "no `strace`: install the package strace");
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace");
    let demo = Demo::start_by(12, |cargo| {
        let mut strace = Command::new("strace");
        strace.args(["--follow-forks", "--quiet=all", "--trace=connect,sendto,sendmmsg", "--output"]).arg(&trace);
        strace.arg(cargo.get_program()).args(cargo.get_args());
        for (name, value) in cargo.get_envs() {
            match value {
                Some(value) => strace.env(name, value),
                None => strace.env_remove(name),
            };
        }
        strace.current_dir(cargo.get_current_dir().expect("a folder"));
        strace
    });
    demo.wait_for("demo: Ctrl-C ends all of it");
    let list = demo.list();
    demo.expect_end(&list);
    let trace = fs::read_to_string(&trace).expect("the trace");
    let addresses: Vec<_> = trace.lines().filter(|line| line.contains("sa_family=AF_INET")).collect();
    assert!(addresses.iter().any(|line| line.contains("inet_addr(\"127.0.0.1\")")), "{} lines", addresses.len());
    let others = addresses.iter().copied().filter(|line| !line.contains("\"127.0.0.1\"") || line.contains("htons(53)"));
    assert_eq!(others.collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn ends_when_it_alone_is_told_to() {
    let demo = Demo::start(300);
    demo.wait_for("demo: Ctrl-C ends all of it");
    let list = demo.list();
    assert!(demo.processes().len() > 2, "the demo, baletheus and Prometheus: {:?}", demo.processes());
    kill("TERM", &demo.group.to_string());
    demo.expect_end(&list);
}

#[test]
fn ends_by_itself_where_that_is_asked_for() {
    let demo = Demo::start(1);
    let list = demo.list();
    demo.expect_end(&list);
}

/// Its image is built by `scripts/check/stack demo`, which takes minutes. What that lacks would be a file.
#[test]
fn the_dockerfile_has_all_that_the_demo_is_made_of() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let build = tools::cargo("build").args(["--example", "demo"]).status();
    assert!(build.expect("cargo runs").success());
    let files = fs::read_to_string(tools::built().join("examples/demo.d")).expect("what Cargo made it of");
    let dockerfile = fs::read_to_string(root.join("Dockerfile")).unwrap();
    let (_, stages) = dockerfile.split_once(" AS build\n").expect("the stage that compiles");
    let copied: Vec<_> = stages
        .lines()
        .filter_map(|line| line.strip_prefix("COPY ")?.rsplit_once(' '))
        .flat_map(|(sources, _)| sources.split(' '))
        .filter(|source| !source.starts_with(['-', '/']))
        .collect();
    let ignored = fs::read_to_string(root.join(".dockerignore")).unwrap();
    for source in &copied {
        assert!(ignored.lines().any(|line| line.strip_prefix('!') == Some(source)), ".dockerignore hides {source}");
    }
    let files: Vec<_> =
        files.split_whitespace().skip(1).map(|file| Path::new(file).strip_prefix(root).unwrap()).collect();
    assert!(files.contains(&Path::new("examples/demo/main.rs")), "{files:?}");
    for file in files {
        assert!(copied.iter().any(|source| file.starts_with(source)), "{} is not copied", file.display());
    }
}
