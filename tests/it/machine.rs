//! Real machines: one boot serves many checks.

use aegis_tests::House;
use serde_json::json;

const LOCAL: &str = "[rate_limit]\nper_second = 0\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_friend_is_in_a_real_vm_and_the_host_ends_it() {
    let settings =
        format!("{LOCAL}[guest]\ncommand = [\"python3\", \"-m\", \"http.server\", \"8080\"]");
    let house = House::new(&settings, &[]).await;
    let guest = house.guest(json!({})).await;
    let now = house.until_status(&guest, "running").await;
    let vm = now["vmId"].as_str().unwrap();

    let (code, out, err) = house.sh(vm, "uname -r; nproc; hostname; echo oops >&2; exit 7").await;
    assert_eq!((code, err.as_str()), (7, "oops\n"));
    let outside =
        String::from_utf8(std::process::Command::new("uname").arg("-r").output().unwrap().stdout)
            .unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert_ne!(lines[0], outside.trim());
    assert_eq!(lines[1], "1");

    // The disk has the promised size, and is full inside before it is outside.
    let (_, out, _) = house.sh(vm, "cat /sys/block/*/ro /sys/block/*/size").await;
    assert!(out.lines().any(|l| l == (500_000_000u64 / 4096 * 8).to_string()), "{out}");
    let (code, _, err) =
        house.sh(vm, "dd if=/dev/zero of=/root/x bs=1M count=600; rm /root/x").await;
    assert!(err.contains("No space left on device"), "{code} {err}");

    // The agent's endpoint answers through the channel.
    let endpoint = now["agentEndpoint"].as_str().unwrap();
    let out = std::process::Command::new("curl").args(["-s", endpoint]).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("Directory listing"));

    // Frozen, it keeps; thawed, it goes on.
    let gid = guest["guestId"].as_str().unwrap();
    house.host("POST", &format!("/couch/guests/{gid}/freeze"), json!(null)).await.expect(200);
    let ask = json!({"command": ["true"]});
    house.host("POST", &format!("/v1/instances/{vm}/exec"), ask).await.expect(409);
    house.host("POST", &format!("/couch/guests/{gid}/thaw"), json!(null)).await.expect(200);
    house
        .until("it runs again", async |h: &House| {
            let one = h.host("GET", &format!("/v1/instances/{vm}"), json!(null)).await.json();
            (one["state"] == "running").then_some(())
        })
        .await;
    assert_eq!(house.sh(vm, "true").await.0, 0);

    let status =
        house.host("GET", &format!("/couch/guests/{gid}/status"), json!(null)).await.expect(200);
    assert!(status["resourceUsage"]["cpuSeconds"].as_f64().unwrap() > 0.0);
    assert_eq!(status["violations"], json!([]));

    // A fork bomb and a memory hog are its own affair.
    let bomb = json!({"command": ["sh", "-c",
        "b() { b | b & }; b; python3 -c 'x = bytearray(10**9)'; sleep 60"], "timeout_secs": 30});
    let path = format!("/v1/instances/{vm}/exec");
    let bombing =
        tokio::time::timeout(std::time::Duration::from_secs(2), house.host("POST", &path, bomb));
    assert!(bombing.await.is_err(), "the bomb still burns");
    house.host("GET", "/v1/status", json!(null)).await.expect(200);

    let disk = house.home().join("instances").join(vm).join("disk.img");
    assert!(disk.exists());
    let killed =
        house.host("DELETE", &format!("/couch/guests/{gid}"), json!(null)).await.expect(200);
    let machine = &killed["receipt"]["machines"][0];
    assert_eq!(machine["id"], vm);
    assert_eq!(machine["verified"], json!(["process", "cgroup", "network", "disk"]));
    assert!(!disk.exists());
    assert_eq!(house.run_dirs(), Vec::<String>::new());
    assert_eq!(house.processes_with(vm), Vec::<String>::new());
    let refused = std::process::Command::new("curl").args(["-s", endpoint]).status().unwrap();
    assert!(!refused.success());

    // Killed while provisioning: no machine is left either.
    let guest = house.guest(json!({})).await;
    let gid = guest["guestId"].as_str().unwrap();
    let killed =
        house.host("DELETE", &format!("/couch/guests/{gid}"), json!(null)).await.expect(200);
    assert_eq!(killed["receipt"]["machines"].as_array().unwrap().len(), 1);
    assert_eq!(house.run_dirs(), Vec::<String>::new());

    // Past its time, a guest's machine goes by itself.
    let short = json!({"resourceLimits":
        {"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.5, "maxDurationHours": 0.001}});
    let guest = house.guest(short).await;
    let token = guest["authToken"].as_str().unwrap();
    let path = format!("/couch/status?token={token}");
    house
        .until("its token is dead", async |h: &House| {
            (h.host("GET", &path, json!(null)).await.status == 404).then_some(())
        })
        .await;
    house.until("it is gone", async |h: &House| h.run_dirs().is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hosts_own_instance_keeps_its_disk_and_its_logs() {
    let house = House::new(LOCAL, &[]).await;
    let ask = json!({
        "handle": "box", "command": ["sh", "-c", "echo hello; echo there >&2; exec sleep 600"],
        "memory_mb": 256, "disk_gb": 0.5,
    });
    let made = house.host("POST", "/v1/instances", ask.clone()).await.expect(201);
    assert!(made["id"].as_str().unwrap().starts_with("inst-"));
    assert_eq!(house.sh("box", "echo kept > /root/kept").await.0, 0);
    house.host("POST", "/v1/instances", ask.clone()).await.expect(409);

    house.host("POST", "/v1/instances/box/pause", json!(null)).await.expect(200);
    // A paused machine wakes for a command.
    let (code, out, _) = house.sh("box", "head -c 3 /dev/zero | od -An -tx1; printf '\\377'").await;
    assert_eq!(code, 0);
    assert!(out.starts_with(" 00 00 00\n"));

    let stopped = house.host("POST", "/v1/instances/box/stop", json!(null)).await.expect(200);
    assert_eq!(stopped["status"], "stopped");
    let ask = json!({"command": ["true"]});
    house.host("POST", "/v1/instances/box/exec", ask).await.expect(409);
    house.host("POST", "/v1/instances", json!({"handle": "box"})).await.expect(200);
    let (_, out, _) = house.sh("box", "cat /root/kept").await;
    assert_eq!(out, "kept\n");
    let logs = house.host("GET", "/v1/instances/box/logs", json!(null)).await.lines();
    let has = |line: &str, stream: &str| {
        logs.iter().any(|l| l["line"] == line && l["stream"] == stream && l["source"] == "server")
    };
    assert!(has("hello", "stdout") && has("there", "stderr"), "{logs:?}");

    house.host("DELETE", "/v1/instances/box", json!(null)).await.expect(200);
    house.host("GET", "/v1/instances/box", json!(null)).await.expect(404);
    assert_eq!(house.run_dirs(), Vec::<String>::new());

    // One that exits at once does not get stuck, and says its code.
    let ask = json!({"handle": "brief", "command": ["sh", "-c", "exit 3"], "memory_mb": 256});
    house.host("POST", "/v1/instances", ask).await.expect(201);
    let ended = house
        .until("it stopped", async |h: &House| {
            let one = h.host("GET", "/v1/instances/brief", json!(null)).await.json();
            (one["state"] == "stopped").then_some(one)
        })
        .await;
    assert_eq!(ended["exit"]["code"], 3);
    let logs = house.host("GET", "/v1/instances/brief/logs", json!(null)).await.lines();
    assert!(logs.iter().any(|l| l["line"] == "process exited (code=3)"), "{logs:?}");
    house.host("DELETE", "/v1/instances/brief", json!(null)).await.expect(200);
}
