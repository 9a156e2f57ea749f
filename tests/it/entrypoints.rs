//! The entry points of the stack's containers, run without containers: what they make of variables, hostile ones too, and
//! whether a message about an alert reaches each service.

use crate::support;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde_json::{Value, json};
use support::sidecar::PATIENCE;
use support::{executable, tools};
use tempfile::TempDir;

/// Text that could end a string of YAML or a word of a shell, or be replaced by something else.
const HOSTILE: [&str; 8] = [
    "plain",
    "it's \"quoted\" \\ and \\n",
    "$HOME ${HOME} $(id) `id` $$ $1",
    "100% %s %d %(admin)s",
    "a: b # c",
    "- [x]\n  y: {z}\n---\n",
    "\ttab, blank \n\n",
    "ünïcödé 冷蔵庫 &amp; {{ .Status }} $__file{/etc/passwd}",
];

/// A folder with the configuration that an image holds, and a place for what its entry point writes.
struct Image {
    folder: TempDir,
    service: &'static str,
}

impl Image {
    fn new(service: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["etc", "tmp", "password"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        for file in ["prometheus.yml", "alerts/alertmanager/alertmanager.yml", "alerts/alertmanager/messages.tmpl"] {
            let name = Path::new(file).file_name().unwrap();
            fs::copy(project.join(file), folder.path().join("etc").join(name)).unwrap();
        }
        // A stand-in for the program: its environment and its arguments, each ended by a zero byte.
        let program = folder.path().join("program");
        executable::write(&program, "#!/bin/sh\nenv -0\nprintf '%s\\0' -- \"$@\"\n");
        Self { folder, service }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn command(&self, variables: &[(&str, &str)], args: &[&str]) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/entrypoints").join(self.service);
        let mut command = Command::new("sh");
        command.arg(script).args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("HOME", "/nowhere").env("API_KEY", "the-api-key");
        command.env("ETC", self.path("etc")).env("TMPDIR", self.path("tmp")).env("PROGRAM", self.path("program"));
        command.env("PROMTOOL", tools::prometheus(3).promtool);
        command.env("PASSWORD_FOLDER", self.path("password")).env("CGROUP", self.path("cgroup"));
        command.envs(variables.iter().copied());
        command
    }

    fn run(&self, variables: &[(&str, &str)], args: &[&str]) -> Output {
        self.command(variables, args).output().unwrap()
    }

    /// The environment and the arguments of the program.
    fn started(&self, variables: &[(&str, &str)], args: &[&str]) -> (Vec<String>, Vec<String>) {
        let output = self.run(variables, args);
        assert!(output.status.success(), "{variables:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let mut all: Vec<_> = text.trim_end_matches('\0').split('\0').map(str::to_owned).collect();
        let at = all.iter().position(|word| word == "--").expect("arguments");
        let args = all.split_off(at + 1);
        all.pop();
        (all, args)
    }

    fn refused(&self, variables: &[(&str, &str)], why: &str) {
        let output = self.run(variables, &[]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{variables:?}: {error}");
        assert!(error.contains(why), "{variables:?}: {error}");
    }

    fn config(&self) -> Value {
        let text = fs::read_to_string(self.path(&format!("tmp/{}.yml", self.service))).unwrap();
        yaml_serde::from_str(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
    }

    fn secret(&self, file: &str) -> String {
        let path = self.path("tmp").join(file);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600, "{file}");
        fs::read_to_string(path).unwrap()
    }
}

#[test]
fn prometheus_gets_values_as_they_were_typed() {
    for value in HOSTILE {
        let image = Image::new("prometheus");
        let (environment, _) = image.started(
            &[
                ("STACK_NAME", value),
                ("REMOTE_WRITE_URL", "https://example.com/$write?a='b'&c=\"%20\""),
                ("REMOTE_WRITE_USERNAME", value),
                ("REMOTE_WRITE_PASSWORD", value),
            ],
            &[],
        );
        let config = image.config();
        // Prometheus 3 makes $ of $$ in external labels, and only there.
        assert_eq!(config["global"]["external_labels"], json!({"stack": value.replace('$', "$$")}));
        let write = &config["remote_write"][0];
        assert_eq!(write["url"], "https://example.com/$write?a='b'&c=\"%20\"");
        assert_eq!(write["basic_auth"]["username"], value);
        assert_eq!(image.secret("remote-write-password"), value);
        let secrets = ["API_KEY", "REMOTE_WRITE_PASSWORD", "REMOTE_WRITE_BEARER_TOKEN"];
        assert!(!environment.iter().any(|line| secrets.iter().any(|name| line.starts_with(name))), "{environment:?}");
        let mut promtool = Command::new(tools::prometheus(3).promtool);
        promtool.args(["check", "config", "--syntax-only"]).arg(image.path("tmp/prometheus.yml"));
        let output = promtool.output().unwrap();
        assert!(output.status.success(), "{value:?}: {}", String::from_utf8_lossy(&output.stderr));

        image.started(&[("REMOTE_WRITE_URL", "http://h"), ("REMOTE_WRITE_BEARER_TOKEN", value)], &[]);
        assert_eq!(image.secret("remote-write-token"), value);
    }
}

#[test]
fn a_secret_in_the_url_of_the_backend_is_warned_of() {
    for (url, is_warned_of) in [("https://h/write?token=of-mine", true), ("https://h/write", false)] {
        let output = Image::new("prometheus").run(&[("REMOTE_WRITE_URL", url)], &[]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{url}: {told}");
        assert_eq!(told.contains("REMOTE_WRITE_BEARER_TOKEN is for a secret"), is_warned_of, "{url}: {told}");
        assert!(!told.contains("of-mine"), "{told}");
    }
}

#[test]
fn what_has_no_effect_is_said() {
    let said = |service, variables: &[(&str, &str)]| {
        let output = Image::new(service).run(variables, &[]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !text.contains("of-mine"), "{variables:?}: {text}");
        text
    };
    assert_eq!(said("prometheus", &[]), "");
    let text = said("prometheus", &[("REMOTE_WRITE_BEARER_TOKEN", "of-mine"), ("PROMETHEUS_RETENTION", "1d")]);
    assert!(text.contains("REMOTE_WRITE_BEARER_TOKEN has no effect without REMOTE_WRITE_URL"), "{text}");
    assert!(text.contains("PROMETHEUS_RETENTION has no effect: the variables with PROMETHEUS_ are "), "{text}");
    Image::new("prometheus").refused(
        &[("REMOTE_WRITE_URL", "http://h"), ("REMOTE_WRITE_PASSWORD", "of-mine")],
        "REMOTE_WRITE_PASSWORD is set, but REMOTE_WRITE_USERNAME is not",
    );
    assert_eq!(said("alertmanager", &[]), "alertmanager: no receiver is set, so alerts are only shown\n");
    let text = said("alertmanager", &[("ALERT_SLACK", "https://of-mine")]);
    assert!(text.contains("ALERT_SLACK has no effect: ") && text.contains("no receiver is set"), "{text}");
    let text = said("alertmanager", &[("ALERT_SLACK_URL", "https://of-mine"), ("ALERT_PAGERDUTY_KEY", "a")]);
    assert_eq!(text, "alertmanager: messages go to ALERT_SLACK_URL ALERT_PAGERDUTY_KEY\n");
}

/// A stand-in for Prometheus that says whether it reads or is ready, and what its entry point leaves of the data.
struct Reader {
    image: Image,
    status: Arc<Mutex<&'static str>>,
    port: u16,
}

impl Reader {
    const FILES: [&str; 4] = ["wal/00000001", "chunks_head/000001", "01BLOCK/index", "lock"];

    fn new() -> Self {
        let image = Image::new("prometheus");
        executable::write(&image.path("program"), "#!/bin/sh\nexec sleep 60\n");
        fs::write(image.path("boot"), "one\n").unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (port, status) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new("503 Service Unavailable")));
        let answer = status.clone();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let _ = stream.read(&mut [0; 1024]);
                let status = *answer.lock().unwrap();
                let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        let reader = Self { image, status, port };
        reader.fill();
        reader
    }

    fn fill(&self) {
        for name in Self::FILES {
            let file = self.image.path("data").join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
    }

    fn reading(&self) -> PathBuf {
        self.image.path("data/reading")
    }

    /// Starts it, kills it once `seen` holds, and gives what was left of the data at its start, and what was said.
    fn killed_once(&self, seen: impl Fn() -> bool) -> (usize, String) {
        let listen = format!("--web.listen-address=127.0.0.1:{}", self.port);
        let data = self.image.path("data");
        let boot = self.image.path("boot");
        let variables = [("DATA", data.to_str().unwrap()), ("BOOT_ID", boot.to_str().unwrap())];
        let mut command = self.image.command(&variables, &[&listen]);
        let mut running = Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !seen() {
            assert!(Instant::now() < deadline, "it is not counted. Is wget installed?");
            thread::sleep(Duration::from_millis(20));
        }
        let mut stderr = running.0.stderr.take().unwrap();
        let left = Self::FILES.iter().filter(|name| data.join(name).exists()).count();
        drop(running);
        let mut said = String::new();
        stderr.read_to_string(&mut said).unwrap();
        (left, said)
    }

    /// Killed while it reads: the count in the file becomes this one.
    fn killed_while_reading(&self, count: u32) -> (usize, String) {
        let boot = fs::read_to_string(self.image.path("boot")).unwrap();
        let line = format!("{} {count}\n", boot.trim());
        self.killed_once(|| fs::read_to_string(self.reading()).is_ok_and(|text| text == line))
    }
}

/// Prometheus reads its log into memory at each start, and would never come back if the memory does not suffice. Three ends while it
/// reads drop the log; blocks stay, and an alert says what is missing.
#[test]
fn prometheus_forgets_a_log_that_ends_it() {
    let reader = Reader::new();
    for count in 1..=3 {
        assert_eq!(reader.killed_while_reading(count), (4, String::new()));
    }
    let (left, said) = reader.killed_while_reading(1);
    assert!(left == 2 && reader.image.path("data/01BLOCK/index").exists(), "{left} {said}");
    assert!(said.contains("killed three times while it read"), "{said}");
    let rules = reader.image.config()["rule_files"].as_array().unwrap().clone();
    let dropped = rules.iter().find_map(|file| file.as_str().filter(|file| file.ends_with("/dropped.yml")));
    let output = Command::new(tools::prometheus(3).promtool).args(["check", "rules"]).arg(dropped.unwrap()).output();
    assert!(output.unwrap().status.success());

    // A start that gets ready ends the count, and so do a clean end and another boot of the machine: the clock has no part in it.
    reader.fill();
    reader.killed_while_reading(2);
    *reader.status.lock().unwrap() = "200 OK";
    assert_eq!(reader.killed_once(|| !reader.reading().exists()), (4, String::new()));
    *reader.status.lock().unwrap() = "503 Service Unavailable";
    reader.killed_while_reading(1);
    fs::remove_file(reader.image.path("data/lock")).unwrap();
    reader.killed_while_reading(1);
    reader.fill();
    reader.killed_while_reading(2);
    for boot in ["two", "three", "four"] {
        fs::write(reader.image.path("boot"), boot).unwrap();
        assert_eq!(reader.killed_while_reading(1), (4, String::new()));
    }
}

/// What keeps Prometheus from its start is no reason to drop samples: a typo, a full disk, and one that takes no file. The real Prometheus has
/// all samples in the end.
#[test]
fn a_bad_start_loses_no_sample() {
    let image = Image::new("prometheus");
    let own = "    static_configs:\n      - targets: ['localhost:9090']\n";
    let config = fs::read_to_string(image.path("etc/prometheus.yml")).unwrap();
    let reserved = support::port::Reserved::any();
    let port = reserved.number();
    let good = config.replace(own, &own.replace("9090", &port.to_string())).replace("interval: 60s", "interval: 1s");
    let good = good.replace("/etc/prometheus/alerts", "/nowhere");
    assert_ne!(good, config);
    let place = image.path("etc/prometheus.yml");
    fs::write(&place, &good).unwrap();
    let (data, real) = (image.path("data"), tools::prometheus(3));
    fs::create_dir(&data).unwrap();
    let start = |args: &[&str]| {
        let listen = format!("--web.listen-address=127.0.0.1:{port}");
        let mut command = image.command(&[("DATA", data.to_str().unwrap())], &[&[&*listen], args].concat());
        command.env("PROGRAM", &real.binary).env("PROMTOOL", &real.promtool);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let query = |query: &str| -> Option<f64> {
        let url = format!("http://127.0.0.1:{port}/api/v1/query?query={query}");
        let answer: Value = serde_json::from_str(&client().get(url).send().ok()?.text().ok()?).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    };
    // All until now, and until the end of the run before. None if Prometheus does not answer yet.
    let samples = |until: f64| {
        query(&format!("sum(count_over_time(up{{job=\"prometheus\"}}[1h]%20@%20{until}))%20or%20vector(0)"))
    };
    let now = || UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let mut before = (0.0, now());
    let mut run_on = || {
        let running = Running(start(&[]));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ready = !data.join("reading").is_file();
            // Killed, as by a power cut, when further samples are in the log.
            let (count, until) = (samples(now()).unwrap_or_default(), now());
            if count >= before.0 + 3.0
                && ready
                && let Some(known) = samples(before.1)
            {
                assert!(known >= before.0, "{known} samples are left of {}", before.0);
                before = (count, until);
                drop(running);
                return;
            }
            assert!(Instant::now() < deadline, "{count} samples after {}", before.0);
            thread::sleep(Duration::from_millis(50));
        }
    };
    run_on();
    assert!(data.join("lock").exists(), "the end was unclean");
    for _ in 0..4 {
        for (broken, args) in
            [(good.replace("job_name: grafana", "job_nam: grafana"), &[][..]), (good.clone(), &["--typo"][..])]
        {
            fs::write(&place, broken).unwrap();
            let output = start(args).wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() && (said.contains("job_nam") || said.contains("typo")), "{said}");
        }
    }
    fs::write(&place, &good).unwrap();
    (0..3).for_each(|_| run_on());
    // A full disk ends Prometheus while it writes the last segment of its log anew.
    let segments = fs::read_dir(data.join("wal")).unwrap().map(|entry| entry.unwrap().path());
    let last = segments.filter(|path| path.is_file()).max().expect("a segment");
    fs::rename(&last, last.with_extension("repair")).unwrap();
    fs::write(&last, b"").unwrap();
    run_on();
    // A folder in its place: the note about a start cannot be written.
    fs::remove_file(data.join("reading")).unwrap_or_default();
    fs::create_dir(data.join("reading")).unwrap();
    run_on();
}

/// What Prometheus 3 itself makes of the name.
#[test]
fn the_name_of_the_stack_is_in_the_running_prometheus() {
    let image = Image::new("prometheus");
    let name = "it's \"$HOME\" ${HOME} $$ 100%: #1";
    image.started(&[("STACK_NAME", name)], &[]);
    let config = image.path("tmp/prometheus.yml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("/etc/prometheus/alerts/*.yml", "none/*.yml")).unwrap();
    let prometheus = support::prometheus::Prometheus::start(3, &config);
    let status = prometheus.api("status/config")["yaml"].as_str().unwrap().to_owned();
    let loaded: Value = yaml_serde::from_str(&status).unwrap();
    assert_eq!(loaded["global"]["external_labels"]["stack"], name);
}

#[test]
fn a_proxy_is_used_only_where_one_is_set() {
    let image = Image::new("prometheus");
    let jobs = |config: &Value| -> Vec<String> {
        let jobs = config["scrape_configs"].as_array().unwrap().iter();
        let with = jobs.filter(|job| job["proxy_from_environment"] == true);
        with.map(|job| job["job_name"].as_str().unwrap().to_owned()).collect()
    };
    image.started(&[("REMOTE_WRITE_URL", "http://h")], &[]);
    assert_eq!(
        (jobs(&image.config()), &image.config()["remote_write"][0]["proxy_from_environment"]),
        (vec![], &Value::Null)
    );
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"] {
        image.started(&[("REMOTE_WRITE_URL", "http://h"), (name, "http://proxy:3128")], &[]);
        assert_eq!(jobs(&image.config()), ["balena-direct"]);
        assert_eq!(image.config()["remote_write"][0]["proxy_from_environment"], true);
    }
    let image = Image::new("alertmanager");
    image.started(&[], &[]);
    assert_eq!(image.config()["global"], Value::Null);
    image.started(&[("https_proxy", "http://proxy:3128")], &[]);
    assert_eq!(image.config()["global"], json!({"http_config": {"proxy_from_environment": true}}));
    let (environment, _) = Image::new("grafana").started(&[("HTTP_PROXY", "http://p"), ("NO_PROXY", "a,b")], &[]);
    assert!(environment.contains(&"NO_PROXY=a,b,prometheus".to_owned()), "{environment:?}");
}

#[test]
fn an_argument_replaces_the_default_of_the_same_flag() {
    let image = Image::new("prometheus");
    let (_, args) =
        image.started(&[], &["--storage.tsdb.retention.time=1d", "--query.max-samples", "7", "--web.page-title=a b"]);
    let count = |name: &str| args.iter().filter(|arg| arg.split('=').next() == Some(name)).count();
    for flag in ["--storage.tsdb.retention.time", "--query.max-samples", "--web.page-title", "--config.file"] {
        assert_eq!(count(flag), 1, "{flag} in {args:?}");
    }
    assert!(args.contains(&"--storage.tsdb.retention.time=1d".to_owned()), "{args:?}");
    assert!(args.contains(&"--web.page-title=a b".to_owned()), "{args:?}");
}

#[test]
fn an_agent_has_no_rules_and_starts() {
    let image = Image::new("prometheus");
    let output = image.run(&[], &["--agent"]);
    assert_eq!(output.status.code(), Some(2));
    let (_, args) = image.started(&[("REMOTE_WRITE_URL", "http://127.0.0.1:1/")], &["--agent"]);
    assert!(args.iter().all(|arg| !arg.starts_with("--storage.tsdb") && !arg.starts_with("--query")), "{args:?}");
    let mut promtool = Command::new(tools::prometheus(3).promtool);
    promtool.args(["check", "config", "--agent", "--syntax-only"]).arg(image.path("tmp/prometheus.yml"));
    let output = promtool.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let config = image.config();
    assert_eq!((&config["rule_files"], &config["alerting"]), (&Value::Null, &Value::Null));
}

#[test]
fn limits_of_an_answer_are_settings() {
    let image = Image::new("prometheus");
    image.started(&[("PROMETHEUS_SAMPLE_LIMIT", "9000"), ("PROMETHEUS_BODY_SIZE_LIMIT", "5MB")], &[]);
    for job in image.config()["scrape_configs"].as_array().unwrap().iter().take(2) {
        assert_eq!((&job["sample_limit"], &job["body_size_limit"]), (&json!(9000), &json!("5MB")), "{job}");
    }
    for value in ["1\n    x: y", "-1", "99999999999999999999"] {
        image.refused(&[("PROMETHEUS_SAMPLE_LIMIT", value)], "PROMETHEUS_SAMPLE_LIMIT is no number");
    }
    for value in ["much", "300", "1\n    x: 5MB", "MB", "1KMB", "1.MB"] {
        image.refused(&[("PROMETHEUS_BODY_SIZE_LIMIT", value)], "PROMETHEUS_BODY_SIZE_LIMIT is no size");
    }
    // Prometheus' own units.
    for value in ["0", "300KB", "1.5MB", "1MiB", "2GB"] {
        image.started(&[("PROMETHEUS_BODY_SIZE_LIMIT", value)], &[]);
        let mut promtool = Command::new(tools::prometheus(3).promtool);
        promtool.args(["check", "config", "--syntax-only"]).arg(image.path("tmp/prometheus.yml"));
        let output = promtool.output().unwrap();
        assert!(output.status.success(), "{value}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_memory_limit_of_go_follows_from_the_container() {
    for service in ["alertmanager", "grafana"] {
        for (file, text, expected) in [
            ("memory.max", "104857600\n", Some("GOMEMLIMIT=94371840")),
            ("memory.max", "max\n", None),
            ("memory/memory.limit_in_bytes", "104857600\n", Some("GOMEMLIMIT=94371840")),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ] {
            let image = Image::new(service);
            let file = image.path("cgroup").join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
            let (environment, _) = image.started(&[], &[]);
            let found = environment.iter().find(|line| line.starts_with("GOMEMLIMIT=")).map(String::as_str);
            assert_eq!(found, expected, "{service}, {text}");
            let (environment, _) = image.started(&[("GOMEMLIMIT", "1MiB")], &[]);
            assert!(environment.contains(&"GOMEMLIMIT=1MiB".to_owned()));
        }
    }
}

fn password_of(environment: &[String], image: &Image) -> String {
    let file = format!("GF_SECURITY_ADMIN_PASSWORD=$__file{{{}}}", image.path("tmp/admin-password").display());
    assert!(environment.contains(&file), "{environment:?}");
    assert!(!environment.iter().any(|line| line.starts_with("API_KEY")), "{environment:?}");
    image.secret("admin-password")
}

#[test]
fn grafana_has_a_random_password_that_stays_and_is_shown() {
    let (image, other) = (Image::new("grafana"), Image::new("grafana"));
    let mut passwords = Vec::new();
    for image in [&image, &image, &other] {
        let output = image.run(&[], &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().next().unwrap().to_owned();
        let password = image.secret("admin-password");
        assert!(
            password.len() >= 20 && password.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
            "{password}"
        );
        assert!(line.starts_with(&format!("grafana: log in as admin with the password {password} ")), "{line}");
        passwords.push(password);
    }
    assert_eq!(passwords[0], passwords[1], "another start, the same volume");
    assert_ne!(passwords[0], passwords[2], "another volume");
}

#[test]
fn grafana_gets_a_password_as_it_was_typed() {
    for value in HOSTILE.into_iter().chain(["admin"]) {
        let image = Image::new("grafana");
        let output = image.run(&[("GF_SECURITY_ADMIN_PASSWORD", value)], &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert_eq!(said.contains("everybody tries first"), value == "admin", "{said}");
        let text = String::from_utf8(output.stdout).unwrap();
        let environment: Vec<_> = text.split('\0').map(str::to_owned).collect();
        assert_eq!(password_of(&environment, &image), value);
        assert!(!image.path("password/admin").exists());
    }
    let image = Image::new("grafana");
    let (environment, _) = image.started(&[("GF_SECURITY_ADMIN_PASSWORD__FILE", "/run/x")], &[]);
    assert!(!environment.iter().any(|line| line.starts_with("GF_SECURITY_ADMIN_PASSWORD=")), "{environment:?}");
}

fn amtool(image: &Image) {
    let amtool = tools::alertmanager().with_file_name("amtool");
    let config = image.path("tmp/alertmanager.yml");
    let output = Command::new(amtool).arg("check-config").arg(&config).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}\n{}", fs::read_to_string(config).unwrap());
}

#[test]
fn amtool_takes_what_each_receiver_makes() {
    let url = "https://example.com/$x/'a'\"b\"?c=%20{{ .Status }}".replace(' ', "");
    let receivers: [(&str, &[(&str, &str)]); 8] = [
        ("none", &[]),
        ("webhook_configs", &[("ALERT_WEBHOOK_URL", &url)]),
        ("slack_configs", &[("ALERT_SLACK_URL", &url)]),
        ("discord_configs", &[("ALERT_DISCORD_URL", &url)]),
        ("telegram_configs", &[("ALERT_TELEGRAM_TOKEN", "1:a'\"$"), ("ALERT_TELEGRAM_CHAT", "-100123")]),
        ("email_configs", &[("ALERT_EMAIL_TO", "a@b.c, d@e.f"), ("ALERT_EMAIL_SMARTHOST", "mail.b.c:587")]),
        ("pagerduty_configs", &[("ALERT_PAGERDUTY_KEY", "0123456789abcdef0123456789abcdef")]),
        ("heartbeat", &[("ALERT_HEARTBEAT_URL", &url)]),
    ];
    for (kind, variables) in receivers {
        let image = Image::new("alertmanager");
        let (environment, _) = image.started(variables, &[]);
        let secret = |line: &String| {
            [
                "API_KEY",
                "ALERT_WEBHOOK",
                "ALERT_SLACK",
                "ALERT_DISCORD",
                "ALERT_TELEGRAM_TOKEN",
                "ALERT_PAGERDUTY",
                "ALERT_HEARTBEAT",
            ]
            .iter()
            .any(|name| line.starts_with(name))
        };
        assert!(!environment.iter().any(secret), "{environment:?}");
        amtool(&image);
        let config = image.config();
        let receiver = |name: &str| -> Vec<String> {
            let all = config["receivers"].as_array().unwrap().iter();
            let found = all.clone().find(|receiver| receiver["name"] == name).unwrap_or_else(|| panic!("no {name}"));
            found.as_object().unwrap().keys().filter(|key| *key != "name").cloned().collect()
        };
        let some = |kind: &str| if kind == "none" { vec![] } else { vec![kind.to_owned()] };
        let expected = match kind {
            "heartbeat" => [vec![], vec![], some("webhook_configs")],
            "pagerduty_configs" => [vec![], some(kind), vec![]],
            _ => [some(kind), vec![], vec![]],
        };
        assert_eq!(["people", "pager", "heartbeat"].map(receiver), expected, "{kind}");
    }
}

#[test]
fn alertmanager_gets_values_as_they_were_typed() {
    for value in HOSTILE {
        let image = Image::new("alertmanager");
        image.started(
            &[
                ("ALERT_EMAIL_TO", "a@b.c"),
                ("ALERT_EMAIL_FROM", "\"$x %s: #'\" <a@b.c>"),
                ("ALERT_EMAIL_SMARTHOST", "mail.b.c:465"),
                ("ALERT_EMAIL_USERNAME", value),
                ("ALERT_EMAIL_PASSWORD", value),
                ("ALERT_TELEGRAM_TOKEN", value),
                ("ALERT_TELEGRAM_CHAT", "5"),
            ],
            &[],
        );
        amtool(&image);
        let mail = &image.config()["receivers"][0]["email_configs"][0];
        assert_eq!((&mail["auth_username"], &mail["from"]), (&json!(value), &json!("\"$x %s: #'\" <a@b.c>")));
        assert_eq!((image.secret("email-password"), image.secret("telegram-token")), (value.into(), value.into()));
    }
    let image = Image::new("alertmanager");
    for name in ["ALERT_WEBHOOK_URL", "ALERT_SLACK_URL", "ALERT_DISCORD_URL", "ALERT_HEARTBEAT_URL"] {
        for value in ["example.com", "javascript:x", "http://a\n- b"] {
            image.refused(&[(name, value)], name);
        }
    }
    image.refused(&[("ALERT_TELEGRAM_TOKEN", "x")], "ALERT_TELEGRAM_CHAT is not");
    for chat in ["1\n- x", "0", "--1", "99999999999999999999"] {
        let variables = [("ALERT_TELEGRAM_TOKEN", "x"), ("ALERT_TELEGRAM_CHAT", chat)];
        image.refused(&variables, "ALERT_TELEGRAM_CHAT is no number");
    }
    image.refused(&[("ALERT_EMAIL_TO", "a@b.c")], "ALERT_EMAIL_SMARTHOST is not");
    for host in ["mail", "smtp://mail:25", "mail:587x", ":25", "mail:", "a b:25", "a:25\nb:25"] {
        image.refused(&[("ALERT_EMAIL_TO", "a@b.c"), ("ALERT_EMAIL_SMARTHOST", host)], "no host:port");
    }
    for to in ["a@b;c@d", "Ops <a@b>, c", "a", "@b", "a@b,", "<a@b", "a@b c@d", "a@b\nc@d"] {
        image.refused(&[("ALERT_EMAIL_TO", to), ("ALERT_EMAIL_SMARTHOST", "mail:25")], "ALERT_EMAIL_TO is no address");
    }
    for to in ["a+x@b.c", "a@b, c@d", "Ops on Call <a@b.c>,c@d", "\"Doe, J.\" <a@b>", "<a@b>", "Ünı <ü@b>"] {
        for host in ["mail.b.c:587", "127.0.0.1:25", "[::1]:25"] {
            image.started(&[("ALERT_EMAIL_TO", to), ("ALERT_EMAIL_SMARTHOST", host)], &[]);
        }
    }
    image.refused(&[("ALERT_PAGERDUTY_KEY", "a b")], "ALERT_PAGERDUTY_KEY is no integration key");
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // In a container what it has started ends with it. An old watcher would see the next start, and note that it reads.
        let _ = Command::new("pkill").args(["-KILL", "-P", &self.0.id().to_string()]).status();
        // Neither can fail in a way that matters here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a service would take the request, and why not.
fn judge(path: &str, body: &str) -> Result<&'static str, String> {
    let body: Value = serde_json::from_str(body).map_err(|error| format!("invalid_payload: {error}"))?;
    let text = |value: &Value, most: usize| {
        value.as_str().is_some_and(|text| !text.trim().is_empty() && text.chars().count() <= most)
    };
    let (service, good) = match path {
        "/slack" => {
            let attachment = &body["attachments"][0];
            let escaped = |value: &Value| !value.as_str().unwrap_or_default().contains("<!channel>");
            let both = [&attachment["title"], &attachment["text"]];
            ("slack", body["groupLabels"].is_null() && both.iter().all(|value| text(value, 8000) && escaped(value)))
        }
        "/discord" => {
            let embed = &body["embeds"][0];
            ("discord", text(&embed["title"], 256) && text(&embed["description"], 4096))
        }
        "/bot1:token/sendMessage" => {
            ("telegram", text(&body["text"], 4096) && body["chat_id"].to_string().contains("-100123"))
        }
        "/pagerduty" => {
            let key = body["routing_key"].as_str().is_some_and(|key| key.len() == 32);
            let action = ["trigger", "resolve"].contains(&body["event_action"].as_str().unwrap_or_default());
            let severity = ["critical", "error", "warning", "info"]
                .contains(&body["payload"]["severity"].as_str().unwrap_or_default());
            ("pagerduty", key && action && severity && text(&body["payload"]["summary"], 1024))
        }
        "/webhook" => ("webhook", body["version"] == "4" && body["alerts"].is_array()),
        "/heartbeat" => ("heartbeat", body["commonLabels"]["alertname"] == "Watchdog"),
        _ => return Err(format!("404: {path}")),
    };
    if good { Ok(service) } else { Err(format!("{service} rejects {body}")) }
}

/// Answers as the services do: 200 to what they take, 400 to the rest.
fn services() -> (SocketAddr, Receiver<Result<&'static str, String>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (address, (sender, receiver)) = (listener.local_addr().unwrap(), channel());
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                let (mut head, mut length) = (String::new(), 0);
                while reader.read_line(&mut head).is_ok_and(|read| read > 2) {}
                for line in head.to_ascii_lowercase().lines() {
                    if let Some(value) = line.strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap_or(0);
                    }
                }
                let mut body = vec![0; length];
                if reader.read_exact(&mut body).is_err() {
                    return;
                }
                let path = head.split(' ').nth(1).unwrap_or_default();
                let verdict = judge(path, &String::from_utf8_lossy(&body));
                let answer = match &verdict {
                    Ok("pagerduty") => ("202 Accepted", r#"{"status":"success"}"#),
                    Ok("telegram") => (
                        "200 OK",
                        r#"{"ok":true,"result":{"message_id":1,"date":1,"chat":{"id":-100123,"type":"group"}}}"#,
                    ),
                    Ok("slack") => ("200 OK", "ok"),
                    Ok(_) => ("200 OK", "{}"),
                    Err(_) => ("400 Bad Request", "invalid_payload"),
                };
                let _ = sender.send(verdict);
                let _ = write!(
                    reader.get_mut(),
                    "HTTP/1.1 {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}",
                    answer.0,
                    answer.1.len(),
                    answer.1
                );
            });
        }
    });
    (address, receiver)
}

/// A mail server for one message: its recipient and its text.
fn mail_server() -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (address, (sender, receiver)) = (listener.local_addr().unwrap(), channel());
    let serve = move |stream: TcpStream| -> std::io::Result<String> {
        let (mut reader, mut out, mut message, mut data) =
            (BufReader::new(stream.try_clone()?), stream, String::new(), false);
        out.write_all(b"220 here\r\n")?;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(message);
            }
            message.push_str(&line);
            if data {
                if line == ".\r\n" {
                    data = false;
                    out.write_all(b"250 taken\r\n")?;
                }
                continue;
            }
            let answer: &[u8] = match line.get(..4).unwrap_or_default() {
                "DATA" => {
                    data = true;
                    b"354 go on\r\n"
                }
                "QUIT" => {
                    out.write_all(b"221 bye\r\n")?;
                    return Ok(message);
                }
                _ => b"250 here\r\n",
            };
            out.write_all(answer)?;
        }
    };
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            if let Ok(message) = serve(stream) {
                let _ = sender.send(message);
            }
        }
    });
    (address, receiver)
}

/// An Alertmanager that finds its templates in its working directory. Debian's looks for them in a folder that only an installed
/// package has.
fn alertmanager(image: &Image) -> PathBuf {
    const INSTALLED: &[u8] = b"/usr/share/prometheus/alertmanager";
    let here = format!("./{}", "/".repeat(INSTALLED.len() - 2));
    let original = tools::alertmanager();
    let mut program = fs::read(&original).unwrap();
    for at in 0..program.len() - INSTALLED.len() {
        if program[at..].starts_with(INSTALLED) {
            program[at..at + INSTALLED.len()].copy_from_slice(here.as_bytes());
        }
    }
    for template in ["default.tmpl", "email.tmpl"] {
        let from = original.with_file_name(template);
        if from.is_file() {
            fs::copy(from, image.path(template)).unwrap();
        }
    }
    let copy = image.path("alertmanager");
    executable::write(&copy, program);
    copy
}

/// A running Alertmanager behind its entry point.
struct Alertmanager {
    _running: Running,
    address: String,
    seen: Vec<String>,
    lines: Receiver<String>,
}

impl Alertmanager {
    fn start(image: &Image, variables: &[(&str, &str)]) -> Self {
        let storage = format!("--storage.path={}", image.path("data").display());
        let mut command = image.command(variables, &["--web.listen-address=127.0.0.1:0", &storage]);
        command.env("PROGRAM", alertmanager(image)).current_dir(image.path(""));
        command.stderr(Stdio::piped()).stdout(Stdio::null());
        let mut running = Running(command.spawn().unwrap());
        let (sender, lines) = channel();
        let stderr = BufReader::new(running.0.stderr.take().unwrap());
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let (deadline, mut seen) = (Instant::now() + PATIENCE, Vec::new());
        loop {
            let line = lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            seen.push(line.unwrap_or_else(|_| panic!("Alertmanager does not listen:\n{}", seen.join("\n"))));
            let last = seen.last().unwrap();
            if last.contains("Listening on") {
                let address = last.split_whitespace().find_map(|word| word.strip_prefix("address="));
                let address = address.expect("an address").to_owned();
                return Self { _running: running, address, seen, lines };
            }
        }
    }

    fn log(&mut self) -> String {
        self.seen.extend(self.lines.try_iter());
        self.seen.join("\n")
    }

    fn raise(&self, alerts: &Value) {
        let url = format!("http://{}/api/v2/alerts", self.address);
        let request = client().post(url).header("Content-Type", "application/json").body(alerts.to_string());
        let answer = request.send().unwrap();
        assert!(answer.status().is_success(), "{answer:?}");
    }

    /// The sum of a metric's samples.
    fn metric(&self, name: &str) -> f64 {
        let page = client().get(format!("http://{}/metrics", self.address)).send().unwrap().text().unwrap();
        let samples =
            page.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        samples.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }
}

fn client() -> reqwest::blocking::Client {
    // A test that installed one already may keep it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::blocking::Client::builder().no_proxy().build().unwrap()
}

/// A dead man's switch takes a heartbeat that is left out for a death. All times are divided by 60.
#[test]
fn the_heartbeat_is_sent_at_each_interval() {
    let (address, verdicts) = services();
    let image = Image::new("alertmanager");
    let base = image.path("etc/alertmanager.yml");
    let text = fs::read_to_string(&base).unwrap();
    let watchdog = text.find("alertname=\"Watchdog\"").unwrap();
    let (before, after) = text.split_at(watchdog);
    let after = after.replacen(": 1m", ": 1s", 1).replacen(": 50s", ": 833ms", 1);
    let text = [before, &after].concat().replace("/etc/alertmanager", image.path("etc").to_str().unwrap());
    fs::write(&base, text).unwrap();
    let mut running = Alertmanager::start(&image, &[("ALERT_HEARTBEAT_URL", &format!("http://{address}/heartbeat"))]);
    running.raise(
        &json!([{"labels": {"alertname": "Watchdog", "severity": "none"}, "annotations": {"summary": "fires"}}]),
    );
    for _ in 0..5 {
        let verdict = verdicts.recv_timeout(PATIENCE);
        assert_eq!(verdict.unwrap_or_else(|_| panic!("no heartbeat:\n{}", running.log())), Ok("heartbeat"));
    }
    // In each interval, Alertmanager asks its log once whether the group is due. The heartbeat is the only group.
    let looked = running.metric("alertmanager_nflog_queries_total");
    let sent = running.metric("alertmanager_notifications_total");
    assert!(sent >= 5.0 && looked - sent <= 1.0, "{sent} heartbeats in {looked} intervals");
}

/// What fires comes first, since a service cuts a long message at its end, and every device is named: 45 new and 20 old ones.
#[test]
fn a_message_names_every_device() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data.json");
    let alert = |status: &str, number: usize| {
        json!({"status": status, "labels": {"alertname": "DeviceDown", "fleet": "org/gw", "uuid": "u"}, "startsAt": "2026-11-29T14:03:00Z",
            "annotations": {"summary": format!("gateway-{number:04} (A) (org/gw) has been down for 16m 0s")}})
    };
    let resolved = (0..25).map(|number| alert("resolved", number));
    let alerts: Vec<_> = resolved.chain((25..90).map(|number| alert("firing", number))).collect();
    let data = json!({"receiver": "people", "status": "firing", "externalURL": "http://localhost", "groupLabels": {},
        "commonLabels": {"alertname": "DeviceDown", "fleet": "org/gw", "severity": "warning"}, "commonAnnotations": {}, "alerts": alerts});
    fs::write(&file, data.to_string()).unwrap();
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("alerts/alertmanager/messages.tmpl");
    let render = |template: &str| {
        let mut command = Command::new(tools::alertmanager().with_file_name("amtool"));
        command.args(["template", "render", "--template.glob"]).arg(&templates).arg("--template.data").arg(&file);
        command.arg("--template.text").arg(format!("{{{{ template \"{template}\" . }}}}"));
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    for template in ["baletheus.text", "baletheus.slack.text"] {
        let text = render(template);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "gateway-0025 (A) (org/gw) has been down for 16m 0s, since 29 Nov 14:03 UTC");
        let firing = lines[..11].join("\n");
        assert!((25..90).all(|number| firing.contains(&format!("gateway-{number:04} (A)"))), "{text}");
        assert!(lines[11].starts_with("resolved: gateway-0000 (A), gateway-0001 (A), "), "{text}");
        // What Discord and Telegram take.
        assert!(text.chars().count() <= 4096, "{text}");
    }
    assert_eq!(render("baletheus.title").trim(), "65 × DeviceDown (org/gw), warning");
}

/// A real Alertmanager, a device with a hostile name, and services that reject what the real ones would.
#[test]
fn a_message_arrives_at_each_service() {
    let (address, verdicts) = services();
    let (mail, mails) = mail_server();
    let image = Image::new("alertmanager");
    let base = image.path("etc/alertmanager.yml");
    let text = fs::read_to_string(&base).unwrap();
    // Where these two are cannot be set, and the mail server here has no TLS.
    let global = format!(
        "global:\n  telegram_api_url: http://{address}\n  pagerduty_url: http://{address}/pagerduty\n  smtp_require_tls: false\n"
    );
    let text = text
        .replace("group_wait: 30s", "group_wait: 1s")
        .replace("/etc/alertmanager", image.path("etc").to_str().unwrap());
    fs::write(&base, global + &text).unwrap();
    let at = |path: &str| format!("http://{address}/{path}");
    let variables = [
        ("ALERT_WEBHOOK_URL", &*at("webhook")),
        ("ALERT_SLACK_URL", &at("slack")),
        ("ALERT_DISCORD_URL", &at("discord")),
        ("ALERT_HEARTBEAT_URL", &at("heartbeat")),
        ("ALERT_TELEGRAM_TOKEN", "1:token"),
        ("ALERT_TELEGRAM_CHAT", "-100123"),
        ("ALERT_EMAIL_TO", "me@example.com"),
        ("ALERT_EMAIL_SMARTHOST", &mail.to_string()),
        ("ALERT_PAGERDUTY_KEY", "0123456789abcdef0123456789abcdef"),
    ];
    let mut running = Alertmanager::start(&image, &variables);
    let name = "<!channel> *x* [y](javascript:z) & \u{202e} <b>";
    let alerts = json!([
        {"labels": {"alertname": "DiskFull", "severity": "critical", "scope": "device", "uuid": "a1", "device_name": name, "fleet": "<!channel>/f"},
         "annotations": {"summary": format!("{name} (org/f): the disk is 96% full"), "runbook_url": "https://example.com"}},
        {"labels": {"alertname": "Watchdog", "severity": "none"}, "annotations": {"summary": "fires"}},
    ]);
    running.raise(&alerts);

    let deadline = Instant::now() + PATIENCE;
    let mut missing = vec!["slack", "discord", "telegram", "pagerduty", "webhook", "heartbeat"];
    while !missing.is_empty() {
        let verdict = verdicts.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let verdict = verdict.unwrap_or_else(|_| panic!("nothing came from {missing:?}:\n{}", running.log()));
        let service = verdict.unwrap_or_else(|why| panic!("{why}"));
        missing.retain(|name| *name != service);
    }
    let message = mails.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect("a mail");
    assert!(message.contains("RCPT TO:<me@example.com>") && message.contains("DiskFull"), "{message}");
}
