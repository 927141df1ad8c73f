//! kill -9 of the daemon at random instants under load. `AEGIS_TEST_ROUNDS` sets how often.

use std::time::Duration;

use aegis_tests::House;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_and_no_machine_leaks() {
    let rounds: u64 =
        std::env::var("AEGIS_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let mut house = House::new("[rate_limit]\nper_second = 0\n", &[]).await;
    let steady = house.guest(json!({})).await;
    let vm = house.until_status(&steady, "running").await["vmId"].as_str().unwrap().to_owned();
    let boot_id = house.sh(&vm, "cat /proc/sys/kernel/random/boot_id").await.1;
    let mut seed = 0x9e37_79b9_u64;
    for round in 0..rounds {
        let mut codes = Vec::new();
        for _ in 0..3 {
            codes.push(house.invite(json!({})).await["code"].clone());
        }
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let instant = Duration::from_millis(seed >> 54);
        let mut acknowledged: Vec<Value> = Vec::new();
        let mut killed: Vec<Value> = Vec::new();
        let load = async {
            for code in &codes {
                let ask = json!({"code": code, "name": "ty"}).to_string();
                let Some(answer) = house.tcp("POST", "/couch/redeem", ask.as_bytes(), &[]).await
                else {
                    return;
                };
                acknowledged.push(answer.expect(201));
            }
            let path = format!("/couch/guests/{}", acknowledged[0]["guestId"].as_str().unwrap());
            let bearer = format!("Bearer {}", house.host_token());
            let auth = [("authorization", bearer.as_str())];
            if let Some(answer) = house.tcp("DELETE", &path, b"", &auth).await {
                killed.push(answer.expect(200));
            }
            std::future::pending::<()>().await;
        };
        // The daemon's end comes at an instant of its own, whatever runs.
        let _ = tokio::time::timeout(instant, load).await;
        house.kill_9();
        house.start().await;

        for guest in &acknowledged {
            let path = format!("/couch/guests/{}/status", guest["guestId"].as_str().unwrap());
            let now = house.host("GET", &path, json!(null)).await.expect(200);
            if killed.iter().any(|k| k["id"] == guest["guestId"]) {
                assert_eq!(now["status"], "revoked", "round {round}");
            }
        }
        for code in &codes {
            // At most one more redeem, and none for an acknowledged one.
            let ask = json!({"code": code, "name": "thief"});
            let again = house.host("POST", "/couch/redeem", ask.clone()).await.status;
            assert!(again == 409 || again == 201, "{again}");
            assert_eq!(house.host("POST", "/couch/redeem", ask).await.status, 409);
        }
        assert_eq!(house.sh(&vm, "cat /proc/sys/kernel/random/boot_id").await.1, boot_id);
        let live = house.host("GET", "/couch/guests", json!(null)).await.expect(200);
        for guest in live["guests"].as_array().unwrap() {
            if guest["id"] != steady["guestId"] && guest["status"] != "revoked" {
                let path = format!("/couch/guests/{}", guest["id"].as_str().unwrap());
                let end = house.host("DELETE", &path, json!(null)).await.expect(200);
                assert!(end["receipt"]["hash"].is_string());
            }
        }
        let only_steady = house
            .until("all other machines are gone", async |h: &House| {
                let dirs = h.run_dirs();
                (dirs.len() == 1).then_some(dirs)
            })
            .await;
        assert_eq!(only_steady, std::slice::from_ref(&vm));
    }
}
